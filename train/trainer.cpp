#include "train/trainer.h"

#include <chrono>
#include <cmath>
#include <filesystem>
#include <stdexcept>
#include <system_error>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <spdlog/spdlog.h>

#include "data/atomic_file.h"
#include "data/tokenizer_registry.h"
#include "model/loss.h"
#include "model/version_registry.h"
#include "train/evaluate.h"

namespace rwkv {
namespace {

double now_seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

// Refuses a corpus made by a tokenizer other than the one the run names.
void check_tokenizer(const BinidxFile& corpus,
                     const std::string& spec,
                     const std::string& identity) {
  const auto& record = corpus.tokenizer_record();
  if (record && record->identity != identity) {
    throw std::invalid_argument("data.tokenizer = \"" + spec + "\" is " + identity + ", but " +
                                corpus.prefix() + ".bin was made with " + record->identity +
                                "; tokenize the text again or name the tokenizer it was made with");
  }
}

void check_same_tokenizer(const BinidxFile& train, const BinidxFile& validation) {
  const auto& x = train.tokenizer_record();
  const auto& y = validation.tokenizer_record();
  if (x && y && x->identity != y->identity) {
    throw std::invalid_argument("data.validation = \"" + validation.prefix() + "\" was made with " +
                                y->identity + ", but data.train = \"" + train.prefix() +
                                "\" with " + x->identity + "; tokenize both with one tokenizer");
  }
}

// The corpus knows best; a foreign one is taken to be what the configuration says it is.
std::optional<std::string> tokenizer_identity(const DataConfig& data, const BinidxFile& corpus) {
  if (corpus.tokenizer_record()) {
    return corpus.tokenizer_record()->identity;
  }
  if (data.tokenizer) {
    return open_tokenizer(*data.tokenizer)->identity();
  }
  return std::nullopt;
}

void resolve_vocab_size(ModelConfig& model, const BinidxFile& corpus) {
  const auto& record = corpus.tokenizer_record();
  if (model.vocab_size == 0 && !record) {
    throw std::invalid_argument("model.vocab_size is not given, and " + corpus.prefix() +
                                ".tokenizer.json, which would say it, is not there; give the "
                                "vocabulary size of the tokenizer that made the corpus");
  }
  if (model.vocab_size == 0) {
    model.vocab_size = record->vocab_size;
  }
  if (record && model.vocab_size < record->vocab_size) {
    throw std::invalid_argument("model.vocab_size = " + std::to_string(model.vocab_size) + ": " +
                                corpus.prefix() + ".bin was made by a tokenizer of " +
                                std::to_string(record->vocab_size) + " ids; use that or more");
  }
}

SampleOrder make_order(const RunConfig& config, const BinidxFile& corpus) {
  try {
    return SampleOrder(config.data.order,
                       corpus.num_tokens(),
                       config.model.ctx_len,
                       static_cast<uint64_t>(config.train.seed));
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(corpus.prefix() + ".bin: " + error.what());
  }
}

at::ScalarType scalar_type(TrainDtype dtype) {
  return dtype == TrainDtype::kBf16 ? at::kBFloat16 : at::kFloat;
}

at::Tensor as_tensor(std::vector<int64_t>& ids, const Batch& batch) {
  return at::from_blob(ids.data(), {batch.rows, batch.ctx_len}, at::kLong);
}

}  // namespace

RunConfig resolve_run_config(RunConfig config) {
  config.validate();
  const BinidxFile corpus(config.data.train);
  resolve_vocab_size(config.model, corpus);
  if (config.data.tokenizer) {
    const std::string identity = open_tokenizer(*config.data.tokenizer)->identity();
    check_tokenizer(corpus, *config.data.tokenizer, identity);
  }
  if (config.data.validation) {
    check_same_tokenizer(corpus, BinidxFile(*config.data.validation));
  }
  find_version(config.model.version).resolve(config.model);
  config.model.validate();
  return config;
}

Trainer::Trainer(const RunConfig& config)
    : config_(resolve_run_config(config)),
      train_corpus_(config_.data.train),
      tokenizer_identity_(tokenizer_identity(config_.data, train_corpus_)),
      order_(make_order(config_, train_corpus_)),
      total_steps_(config_.total_steps(order_.samples_per_epoch())),
      model_(config_.model) {
  config_.schedule.validate_for(config_.total_tokens(order_.samples_per_epoch()));
  if (config_.data.validation) {
    validation_corpus_.emplace(*config_.data.validation);
  }
  if (config_.train.threads) {
    at::set_num_threads(static_cast<int>(*config_.train.threads));
  }
  start();
}

void Trainer::start() {
  const std::string& run_dir = config_.train.run_dir;
  const auto checkpoint = newest_checkpoint(run_dir);
  if (checkpoint) {
    const SavedRun saved = read_saved_run(*checkpoint);
    check_matches_checkpoint(config_,
                             saved.config,
                             {.checkpoint = *checkpoint,
                              .tokens_seen = saved.state.tokens,
                              .samples_per_epoch = order_.samples_per_epoch()});
    state_ = saved.state;
  } else {
    model_->initialise(static_cast<uint64_t>(config_.train.seed), config_.schedule.lr_init);
  }
  optimizer_ =
      std::make_unique<Optimizer>(model_, config_.optimizer, scalar_type(config_.train.dtype));
  if (checkpoint) {
    load_optimizer(*checkpoint, state_, *optimizer_);
    spdlog::info("going on from {}", *checkpoint);
  }
  std::error_code error;
  std::filesystem::create_directories(run_dir, error);
  if (error) {
    throw std::runtime_error(run_dir + ": cannot be made the run's folder: " + error.message() +
                             "; name another train.run_dir");
  }
  AtomicFile file((std::filesystem::path(run_dir) / "config.toml").string());
  file.write(to_toml(config_));
  file.commit();
  loader_ = std::make_unique<BatchLoader>(train_corpus_,
                                          order_,
                                          BatchPlan{.rows = config_.micro_batch_sequences(),
                                                    .ctx_len = config_.model.ctx_len,
                                                    .first_sample = state_.samples,
                                                    .vocab_size = config_.model.vocab_size});
}

double Trainer::accumulate_micro_batch() {
  Batch batch = loader_->next();
  const at::Tensor inputs_BT = as_tensor(batch.inputs, batch);
  const at::Tensor targets_BT = as_tensor(batch.targets, batch);
  const ModelOutput output = model_->forward(inputs_BT, model_->initial_state(batch.rows));
  const at::Tensor loss = cross_entropy_loss(output.logits_BTV, targets_BT, config_.train.l2wrap);
  const double share =
      static_cast<double>(batch.rows) / static_cast<double>(config_.batch_sequences());
  (loss * share).backward();
  optimizer_->accumulate_gradient();
  state_.samples += batch.rows;
  return loss.item<double>() * share;
}

StepResult Trainer::step() {
  StepResult result;
  result.lr = config_.schedule.lr(state_.tokens, config_.total_tokens(order_.samples_per_epoch()));
  optimizer_->zero_gradient();
  const int64_t micro_batches = config_.batch_sequences() / config_.micro_batch_sequences();
  for (int64_t i = 0; i < micro_batches; ++i) {
    result.loss += accumulate_micro_batch();
  }
  result.grad_norm = optimizer_->gradient_norm();
  check_finite(result);
  optimizer_->step(result.lr, result.grad_norm);
  ++state_.step;
  state_.tokens += config_.tokens_per_step();
  return result;
}

void Trainer::check_finite(const StepResult& result) const {
  if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) {
    return;
  }
  const std::string tensor = optimizer_->first_nonfinite_gradient();
  const auto newest = newest_checkpoint(config_.train.run_dir);
  throw std::runtime_error(
      "step " + std::to_string(state_.step + 1) + ": loss " + std::to_string(result.loss) +
      ", gradient norm " + std::to_string(result.grad_norm) +
      (tensor.empty() ? "" : ", first in " + tensor) + ", on samples " +
      std::to_string(state_.samples - config_.batch_sequences()) + " to " +
      std::to_string(state_.samples - 1) +
      "; the update was not made. A lower schedule.lr_init or optimizer.clip_norm may help; " +
      (newest ? "the last good checkpoint is " + *newest : "there is no checkpoint yet"));
}

double Trainer::validate() {
  const Evaluation evaluation = evaluate(model_,
                                         *validation_corpus_,
                                         {.ctx_len = config_.model.ctx_len,
                                          .batch_size = config_.micro_batch_sequences(),
                                          .max_tokens = config_.train.validation_tokens});
  return evaluation.loss;
}

void Trainer::save() {
  const std::string path = save_checkpoint(config_.train.run_dir,
                                           config_,
                                           tokenizer_identity_,
                                           *optimizer_,
                                           state_,
                                           {.newest = config_.train.keep_checkpoints});
  spdlog::info("saved {}", path);
}

void Trainer::log_start() const {
  spdlog::info("{}: {} layers, {} wide, vocabulary {}, {} parameters",
               config_.model.version,
               config_.model.n_layer,
               config_.model.n_embd,
               config_.model.vocab_size,
               format_count(model_->num_parameters()));
  spdlog::info("{}: {} tokens, {} windows of {} an epoch",
               train_corpus_.prefix(),
               format_count(train_corpus_.num_tokens()),
               order_.samples_per_epoch(),
               config_.model.ctx_len);
  spdlog::info("{} steps of {} tokens, {:.2f} epochs; {} threads",
               total_steps_,
               config_.tokens_per_step(),
               static_cast<double>(total_steps_ * config_.batch_sequences()) /
                   static_cast<double>(order_.samples_per_epoch()),
               at::get_num_threads());
}

void Trainer::run() {
  log_start();
  if (state_.step >= total_steps_) {
    spdlog::info("{}: all {} steps are done already", config_.train.run_dir, total_steps_);
    return;
  }
  const TrainConfig& train = config_.train;
  const auto is_due = [&](std::optional<int64_t> every) {
    return state_.step == total_steps_ || (every && state_.step % *every == 0);
  };
  MetricsFile metrics((std::filesystem::path(train.run_dir) / "metrics.jsonl").string(),
                      state_.step);
  ProgressMeter meter(total_steps_, state_.tokens, now_seconds());
  while (state_.step < total_steps_) {
    const bool first = state_.step == 0;
    const StepResult result = step();
    StepRecord record = meter.finish_step(
        state_.step, state_.tokens, result.loss, result.lr, result.grad_norm, now_seconds());
    const double pause = now_seconds();
    if (validation_corpus_ && is_due(train.validate_every_steps)) {
      record.validation_loss = validate();
    }
    if (first || is_due(train.log_every_steps) || record.validation_loss) {
      metrics.write(record);
      spdlog::info("{}", format_step_line(record));
    }
    if (is_due(train.save_every_steps)) {
      save();
    }
    meter.exclude_seconds(now_seconds() - pause);
  }
}

}  // namespace rwkv
