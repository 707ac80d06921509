#include "train/trainer.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <span>
#include <stdexcept>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/api/include/torch/version.h>

#include <nlohmann/json.hpp>
#include <spdlog/fmt/fmt.h>
#include <spdlog/spdlog.h>

#include "data/atomic_file.h"
#include "data/tokenizer_registry.h"
#include "model/formats/format_registry.h"
#include "train/config_value.h"
#include "train/distributed/weight_comparison.h"
#include "train/evaluate.h"
#include "train/generate_text.h"
#include "train/machine.h"
#include "train/machine_rates.h"
#include "train/model_tokenizer.h"
#include "train/op_checks.h"
#include "train/plan_report.h"
#include "train/run_setup.h"
#include "train/stop_signal.h"
#include "train/version.h"

namespace rwkv {
namespace {

// For durations: the wall clock may jump.
double now_seconds() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

double wall_clock_seconds() {
  using namespace std::chrono;
  return duration<double>(system_clock::now().time_since_epoch()).count();
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

// Of the matrix products; the embedding is none. A weight costs 2 in the forward pass, 2 for its
// gradient if it is trained, and 2 for that of its input if something below it is: parameters come
// in the order in which the forward pass meets them.
double matrix_flops_per_token(RwkvModel model) {
  double flops = 0;
  bool trained_below = false;
  for (const auto& item : model->named_parameters()) {
    const at::Tensor& parameter = item.value();
    const bool trained = parameter.requires_grad();
    if (parameter.squeeze().dim() == 2 && item.key() != "emb.weight") {
      flops += (2 + 2 * trained + 2 * trained_below) * static_cast<double>(parameter.numel());
    }
    trained_below = trained_below || trained;
  }
  return flops;
}

// A corpus may lie elsewhere when a run goes on, but must be the one it began with.
void check_same_corpus(const BinidxFile& corpus,
                       const std::string& saved_fingerprint,
                       const std::string& checkpoint) {
  if (!saved_fingerprint.empty() && saved_fingerprint != corpus.fingerprint()) {
    throw std::invalid_argument(
        "data.train = \"" + corpus.prefix() + "\": holds " + corpus.fingerprint() + ", but " +
        checkpoint + " was trained on " + saved_fingerprint +
        "; name the corpus that the run began with, or begin a new run with init.from = that "
        "checkpoint");
  }
  require_tokenizer_of(read_weights(checkpoint), corpus);
}

// Waits for the device.
Telemetry numbers_of(const ModelTelemetry& telemetry) {
  Telemetry numbers{.largest_logit = telemetry.largest_logit.item<double>()};
  for (const auto& [name, tensor] : telemetry.by_layer) {
    const at::Tensor values_LH = tensor.to(at::kCPU, at::kDouble).contiguous();
    const auto* values = values_LH.const_data_ptr<double>();
    const int64_t n_head = values_LH.size(1);
    for (int64_t layer = 0; layer < values_LH.size(0); ++layer) {
      numbers.by_layer[name].emplace_back(values + layer * n_head, values + (layer + 1) * n_head);
    }
  }
  return numbers;
}

// Losses from another state than before are those of another run.
void check_same_initial_state(const std::string& now,
                              const std::string& saved,
                              const std::string& checkpoint) {
  const auto described = [](const std::string& hash) {
    return hash.empty() ? std::string("none") : "one with the checksum " + hash;
  };
  if (now != saved) {
    throw std::invalid_argument("init.state: " + checkpoint + " began every sequence from " +
                                described(saved) + ", now it is " + described(now) +
                                "; name the file that the run began with, or begin a new run");
  }
}

void say_saved(const std::optional<SavedCheckpoint>& saved, RunLog* log) {
  if (saved && log != nullptr) {
    log->say(describe(*saved));
  }
}

// A validation or a sample may take minutes, and a scheduler that asks to stop does not wait.
struct Stopped {};
void stop_if_asked() {
  if (stop_signal() != 0) {
    throw Stopped();
  }
}

void write_file(const std::string& run_dir, const char* name, const std::string& text) {
  AtomicFile file((std::filesystem::path(run_dir) / name).string());
  file.write(text);
  file.commit();
}

}  // namespace

Trainer::Trainer(const RunConfig& config, const Placement& placement)
    : Trainer(config, placement, Purpose::kTrain, std::nullopt) {}

Trainer Trainer::before_step(const RunConfig& config, int64_t step) {
  return Trainer(config, {}, Purpose::kReplay, step);
}

Trainer::Trainer(const RunConfig& config,
                 const Placement& placement,
                 Purpose purpose,
                 std::optional<int64_t> before_step)
    : config_(resolve_run_config(config)),
      placement_(placement),
      train_corpus_(config_.data.train),
      tokenizer_identity_(tokenizer_identity(config_.data, train_corpus_)),
      order_(make_order(config_, train_corpus_)),
      total_steps_(config_.total_steps(order_.samples_per_epoch())),
      model_(config_.model) {
  config_.schedule.validate_for(config_.total_tokens(order_.samples_per_epoch()));
  if (config_.data.validation) {
    validation_corpus_.emplace(*config_.data.validation);
  }
  if (config_.sample.every_steps) {
    tokenizer_ = open_tokenizer(*config_.data.tokenizer);
  }
  // Not LibTorch's default: that follows environment variables, and equal bits need equal numbers.
  const int64_t cores_each = std::max<int64_t>(describe_machine().cores / placement_.local_size, 1);
  at::set_num_threads(static_cast<int>(config_.train.threads.value_or(cores_each)));
  const std::string device = device_of(config_.train.device, placement_);
  device_ = open_device(device, "train.device = " + to_config_text(std::string_view(device)));
  if (placement_.world_size > config_.batch_sequences()) {
    throw std::invalid_argument("train.batch_size = " + std::to_string(config_.batch_sequences()) +
                                ": fewer sequences a step than the " +
                                std::to_string(placement_.world_size) +
                                " processes; give at least one to each");
  }
  freeze_parameters(model_, config_.optimizer.freeze);
  initial_state_ = set_initial_state(model_, config_.init);
  // What is refused before leaves no folder behind.
  if (purpose == Purpose::kTrain && is_first()) {
    lock_.emplace(config_.train.run_dir);
    require_writable_checkpoints(config_.train.run_dir);
  }
  start(before_step);
  if (purpose == Purpose::kTrain) {
    saver_ = std::make_unique<CheckpointSaver>(
        CheckpointSettings{.config = config_,
                           .tokenizer_identity = tokenizer_identity_,
                           .retention = {.newest = config_.train.keep_checkpoints,
                                         .every_steps = config_.train.keep_every_steps}},
        communicator_.get());
  }
}

// Runs `work`; what it fails with is told to the other processes, which would wait for this one.
template <typename Work>
auto Trainer::announcing(const Work& work) {
  try {
    return work();
  } catch (const std::exception& error) {
    if (communicator_ != nullptr) {
      communicator_->announce_failure(error.what());
    }
    throw;
  }
}

// The first process looks, and tells the others: a checkpoint is read whole.
std::optional<std::string> Trainer::choose_checkpoint(std::optional<int64_t> before_step) {
  std::optional<std::string> chosen;
  if (is_first()) {
    const auto [checkpoint, refused] =
        newest_whole_checkpoint(config_.train.run_dir, Scrutiny::kContents, before_step);
    for (const std::string& damage : refused) {
      spdlog::warn("{}; this checkpoint is not whole, an older one is taken", damage);
    }
    chosen = checkpoint;
  }
  if (communicator_ != nullptr) {
    const std::string path =
        communicator_->text_of_first(chosen.value_or(""), "the choice of a checkpoint");
    chosen = path.empty() ? std::nullopt : std::optional(path);
  }
  return chosen;
}

void Trainer::start(std::optional<int64_t> before_step) {
  if (placement_.world_size > 1) {
    communicator_ = std::make_unique<Communicator>(
        placement_,
        device_,
        std::chrono::milliseconds(std::llround(1000 * config_.distributed.timeout_s)));
  }
  announcing([&] { prepare(before_step); });
}

// The first process makes the weights, and gives them to the others: large orthogonal ones take all
// its cores for minutes.
void Trainer::make_initial_weights() {
  if (is_first()) {
    set_initial_weights(model_, config_);
  }
  if (communicator_ != nullptr) {
    for (const auto& item : model_->named_parameters()) {
      communicator_->broadcast(item.value().detach(), 0, "the handing out of initial weights");
    }
  }
}

void Trainer::prepare(std::optional<int64_t> before_step) {
  const std::optional<std::string> checkpoint = choose_checkpoint(before_step);
  if (checkpoint) {
    const SavedRun saved = read_saved_run(*checkpoint);
    check_matches_checkpoint(config_,
                             saved.config,
                             {.checkpoint = *checkpoint,
                              .tokens_seen = saved.state.tokens,
                              .samples_per_epoch = order_.samples_per_epoch()});
    state_ = saved.state;
    if (!config_.train.skip_outliers_z) {
      state_.outliers.forget();
    }
    saved_step_ = state_.step;
  } else {
    make_initial_weights();
  }
  started_step_ = state_.step;
  if (checkpoint) {
    check_same_initial_state(initial_state_, state_.initial_state, *checkpoint);
  }
  state_.initial_state = initial_state_;
  move_to_device(model_, device_);
  model_->set_recompute(config_.train.recompute);
  // A GPU's memory is dear; the sum of several gradients keeps fp32.
  const bool on_gpu = device_.runtime != nullptr;
  optimizer_ = std::make_unique<Optimizer>(
      model_,
      config_.optimizer,
      scalar_type(config_.train.dtype),
      OptimizerMemory{.split_masters = on_gpu,
                      .bf16_gradient = on_gpu && most_micro_batches() == 1},
      Sharding{.rank = placement_.rank,
               .num_processes = placement_.world_size,
               .zero_stage = placement_.world_size == 1 ? 0 : config_.distributed.zero});
  if (checkpoint) {
    load_optimizer(*checkpoint, state_, *optimizer_);
    check_same_corpus(train_corpus_, state_.corpus, *checkpoint);
    if (is_first()) {
      spdlog::info("going on from {}", *checkpoint);
    }
  } else if (before_step) {
    spdlog::info("no checkpoint before step {}: doing all steps before it again", *before_step);
  }
  state_.corpus = train_corpus_.fingerprint();
  runner_ = std::make_unique<StepRunner>(
      model_,
      *optimizer_,
      device_.runtime,
      StepSettings{.micro_batches = micro_batches(placement_.rank),
                   .most_micro_batches = most_micro_batches(),
                   .step_rows = communicator_ == nullptr ? 0 : config_.batch_sequences(),
                   .l2wrap = config_.train.l2wrap,
                   .record = can_record()},
      communicator_.get());
  loader_ = std::make_unique<BatchLoader>(train_corpus_,
                                          order_,
                                          BatchPlan{.rows = micro_batch_rows(placement_.rank),
                                                    .ctx_len = config_.model.ctx_len,
                                                    .first_sample = state_.samples,
                                                    .step_samples = config_.batch_sequences(),
                                                    .first_share = first_share(placement_.rank),
                                                    .share = share(placement_.rank),
                                                    .vocab_size = config_.model.vocab_size});
}

// ---- One step -----------------------------------------------------------------------------------

int64_t Trainer::first_share(int64_t rank) const {
  return rank * config_.batch_sequences() / placement_.world_size;
}

int64_t Trainer::share(int64_t rank) const {
  return first_share(rank + 1) - first_share(rank);
}

int64_t Trainer::micro_batch_rows(int64_t rank) const {
  return std::min(config_.micro_batch_sequences(), share(rank));
}

int64_t Trainer::micro_batches(int64_t rank) const {
  return (share(rank) + micro_batch_rows(rank) - 1) / micro_batch_rows(rank);
}

// Shares differ by one sequence, and the last process has one of the largest.
int64_t Trainer::most_micro_batches() const {
  return micro_batches(placement_.world_size - 1);
}

bool Trainer::can_record() const {
  const bool is_even = share(placement_.rank) % micro_batch_rows(placement_.rank) == 0;
  if (config_.train.cuda_graph && device_.runtime != nullptr && !is_even) {
    spdlog::warn(
        "rank {}: {} sequences do not divide into micro-batches of {}: the step is not "
        "recorded as a graph",
        placement_.rank,
        share(placement_.rank),
        micro_batch_rows(placement_.rank));
  }
  return config_.train.cuda_graph && is_even;
}

Trainer::Samples Trainer::add_micro_batch(std::optional<ModelTelemetry>* telemetry) {
  Batch batch = loader_->next();
  if (telemetry != nullptr) {
    *telemetry = model_->telemetry(as_tensor(batch.inputs, batch).to(device_.device),
                                   model_->initial_state(batch.rows));
  }
  runner_->add_micro_batch(as_tensor(batch.inputs, batch), as_tensor(batch.targets, batch));
  return {.first = batch.first_sample, .rows = batch.rows};
}

std::optional<Trainer::LaunchedStep> Trainer::launch_step() {
  const double lr =
      config_.schedule.lr(state_.tokens, config_.total_tokens(order_.samples_per_epoch()));
  if (communicator_ != nullptr) {
    communicator_->set_activity("step " + std::to_string(state_.step + 1));
    agree();
  }
  const auto& telemetry_every = config_.train.telemetry_every_steps;
  const bool is_watched =
      is_first() && telemetry_every && (state_.step + 1) % *telemetry_every == 0;
  std::optional<ModelTelemetry> telemetry;
  runner_->begin_step();
  for (int64_t i = 0; i < micro_batches(placement_.rank); ++i) {
    if (asked_to_stop() != 0) {
      return std::nullopt;
    }
    add_micro_batch(is_watched && i == 0 ? &telemetry : nullptr);
  }
  OutlierLimits limits;
  if (const auto& z = config_.train.skip_outliers_z) {
    limits = state_.outliers.limits(state_.step + 1, *z);
    optimizer_->set_limits(limits.loss, limits.gradient_norm);
  }
  if (saver_) {
    saver_->wait_for_copy();
  }
  LaunchedStep launched{.before = state_,
                        .lr = lr,
                        .limits = limits,
                        .numbers = runner_->finish_step(lr),
                        .telemetry = std::move(telemetry)};
  ++state_.step;
  state_.samples += config_.batch_sequences();
  state_.tokens += config_.tokens_per_step();
  return launched;
}

StepResult Trainer::result_of(LaunchedStep& launched) {
  const StepNumbers numbers = launched.numbers.wait();
  StepResult result{.loss = numbers.loss, .grad_norm = numbers.gradient_norm, .lr = launched.lr};
  if (numbers.skipped) {
    // A save under way may be of weights that are not finite: then that is the reason to be told.
    if (saver_) {
      saver_->settle();
    }
    // Neither it nor any step after it has changed a weight.
    const bool is_newest = state_.step == launched.before.step + 1;
    state_ = launched.before;
    throw std::runtime_error(where_not_finite(result, is_newest));
  }
  if (!config_.train.skip_outliers_z) {
    return result;
  }
  const int64_t step = launched.before.step + 1;
  if (numbers.outlier) {
    state_.outliers.add_skipped();
    result.skipped = {.step = step,
                      .first_sample = launched.before.samples,
                      .last_sample = launched.before.samples + config_.batch_sequences() - 1,
                      .loss = result.loss,
                      .gradient_norm = result.grad_norm,
                      .limits = launched.limits};
  } else {
    state_.outliers.add_applied(step, result.loss, result.grad_norm);
  }
  return result;
}

void Trainer::agree() {
  // One message: a bit each. A signal's is the one of its number.
  constexpr int64_t kTimeOver = int64_t{1} << 40, kSaveDue = int64_t{1} << 41;
  const int signal = stop_signal();
  const int64_t own = (signal == 0 ? 0 : int64_t{1} << signal) | (is_time_over() ? kTimeOver : 0) |
                      (is_save_due() ? kSaveDue : 0);
  const int64_t all = communicator_->any_bits(own, "the agreement on what to do");
  const int64_t signals = all & (kTimeOver - 1);
  agreed_ = {.stop_signal = signals == 0 ? 0 : std::countr_zero(static_cast<uint64_t>(signals)),
             .minutes_over = (all & kTimeOver) != 0,
             .save_due = (all & kSaveDue) != 0};
}

int Trainer::asked_to_stop() const {
  return communicator_ == nullptr ? stop_signal() : agreed_.stop_signal;
}

std::optional<StepResult> Trainer::step() {
  std::optional<LaunchedStep> launched = launch_step();
  return launched ? std::optional(result_of(*launched)) : std::nullopt;
}

// The samples whose loss is not finite, of all processes, or else all of the step.
std::string Trainer::samples_not_finite(bool is_newest) const {
  int64_t first = -1;
  // What a later step has left says nothing of this one.
  if (is_newest) {
    const at::Tensor losses = runner_->losses();
    const std::span all(losses.const_data_ptr<float>(), static_cast<size_t>(losses.numel()));
    const auto bad = std::ranges::find_if(all, [](float loss) { return !std::isfinite(loss); });
    if (bad != all.end()) {
      first = (bad - all.begin()) * micro_batch_rows(placement_.rank);
    }
  }
  const std::vector<int64_t> of_all =
      communicator_ == nullptr ? std::vector{first}
                               : communicator_->values_of_all(first, "the search for its cause");
  const auto found = std::ranges::find_if(of_all, [](int64_t of_rank) { return of_rank >= 0; });
  if (found == of_all.end()) {
    return "samples " + std::to_string(state_.samples) + " to " +
           std::to_string(state_.samples + config_.batch_sequences() - 1);
  }
  const int64_t rank = found - of_all.begin();
  const int64_t begin = state_.samples + first_share(rank) + *found;
  const int64_t count = std::min(micro_batch_rows(rank), share(rank) - *found);
  return (communicator_ == nullptr ? "" : "rank " + std::to_string(rank) + "'s ") + "samples " +
         std::to_string(begin) + " to " + std::to_string(begin + count - 1);
}

std::string Trainer::where_not_finite(const StepResult& result, bool is_newest) const {
  std::string weight, tensor;
  if (is_newest) {
    weight = optimizer_->first_nonfinite_weight();
    tensor = optimizer_->first_nonfinite_gradient();
  }
  const std::string step = std::to_string(state_.step + 1);
  return "step " + step + ": loss " + std::to_string(result.loss) + ", gradient norm " +
         std::to_string(result.grad_norm) +
         (!weight.empty()   ? ", for " + weight + " was not finite before it"
          : !tensor.empty() ? ", first in the gradient of " + tensor
                            : "") +
         ", on " + samples_not_finite(is_newest) +
         "; the update was not made. rookery train with the same options and --replay " + step +
         " finds the op. " + advice_where_not_finite(config_.train.run_dir);
}

std::string Trainer::replay() {
  const std::string name = "step " + std::to_string(state_.step + 1);
  std::string report = name + ", from samples " + std::to_string(state_.samples) + " to " +
                       std::to_string(state_.samples + config_.batch_sequences() - 1) + "\n";
  OpChecks checks(model_);
  std::vector<Samples> samples;
  runner_->begin_step();
  for (int64_t i = 0; i < micro_batches(placement_.rank); ++i) {
    samples.push_back(add_micro_batch());
  }
  const at::Tensor losses = runner_->losses();
  for (size_t i = 0; i < samples.size(); ++i) {
    report += "samples " + std::to_string(samples[i].first) + " to " +
              std::to_string(samples[i].first + samples[i].rows - 1) + ": loss " +
              std::to_string(losses.const_data_ptr<float>()[i]) + "\n";
  }
  const std::string finding = checks.first_finding();
  const std::string tensor = optimizer_->first_nonfinite_gradient();
  report += "gradient norm " + std::to_string(optimizer_->gradient_norm()) +
            (tensor.empty() ? "" : "; not finite, first in " + tensor) + "\n";
  report += finding.empty()
                ? "the results of all " + std::to_string(checks.num_ops()) + " ops are finite\n"
                : "the first result that is not finite: " + finding + "\n";
  return report;
}

// ---- The run ------------------------------------------------------------------------------------

RunEnd Trainer::run() {
  return announcing([this] { return run_steps(); });
}

RunEnd Trainer::run_steps() {
  if (communicator_ != nullptr) {
    agree();
  }
  if (const auto ended = end()) {
    if (is_first()) {
      spdlog::info(
          "{}: nothing to do after step {}: {}", config_.train.run_dir, state_.step, ended->reason);
    }
    return *ended;
  }
  // The first process's alone.
  std::optional<RunLog> first_log;
  if (is_first()) {
    first_log.emplace(config_, state_.step, wall_clock_seconds());
  }
  RunLog* const log = first_log ? &*first_log : nullptr;
  flops_per_token_ = matrix_flops_per_token(model_);
  if (log != nullptr) {
    // Of all processes, as the tokens a second are.
    matrix_flops_per_s_ = matmul_flops_per_s(scalar_type(config_.train.dtype), device_.runtime) *
                          static_cast<double>(placement_.world_size);
    write_start(*log);
  }
  started_s_ = saved_s_ = now_seconds();
  elapsed_before_s_ = state_.elapsed_s;
  ProgressMeter meter(
      state_.tokens, started_s_, log == nullptr ? std::nullopt : log->smoothed_loss());
  std::optional<RunEnd> ended;
  // A device goes on with the next step while the numbers of the one before it are looked at.
  std::optional<LaunchedStep> waiting;
  while (!ended) {
    std::optional<LaunchedStep> launched = launch_step();
    say_saved(saver_->take_saved(), log);
    state_.elapsed_s = elapsed_before_s_ + now_seconds() - started_s_;
    if (waiting) {
      log_step(*waiting, meter, log);
      waiting.reset();
    }
    ended = end();
    if (launched && (device_.runtime == nullptr || is_work_due())) {
      finish_step(*launched, meter, log);
      ended = end();
    } else {
      waiting = std::move(launched);
    }
  }
  if (waiting) {
    log_step(*waiting, meter, log);
  }
  if (log != nullptr) {
    log->add_shown();
  }
  if (state_.step > 0 && state_.step != saved_step_) {
    save(log);
  }
  say_saved(saver_->wait(), log);
  if (log != nullptr) {
    log->say(config_.train.run_dir + ": ended at step " + std::to_string(state_.step) + ": " +
             ended->reason);
  }
  if (communicator_ != nullptr) {
    // Nobody goes before the last has what it needs of the others.
    communicator_->barrier("the end of the run");
  }
  return *ended;
}

void Trainer::write_start(RunLog& log) const {
  const std::string& run_dir = config_.train.run_dir;
  const std::string parameters = describe_parameters(model_, config_.optimizer);
  write_file(run_dir, "config.toml", to_toml(config_));
  write_file(run_dir, "parameters.txt", parameters);
  const Machine machine = describe_machine();
  const nlohmann::ordered_json start = {{"step", state_.step},
                                        {"tokens", state_.tokens},
                                        {"time", wall_clock_seconds()},
                                        {"rookery", rookery_version()},
                                        {"libtorch", TORCH_VERSION},
                                        {"system", machine.system},
                                        {"processor", machine.processor},
                                        {"cores", machine.cores},
                                        {"features", machine.features},
                                        {"memory_bytes", machine.memory_bytes},
                                        {"processes", placement_.world_size},
                                        {"threads", at::get_num_threads()},
                                        {"device", device_name()},
                                        {"matrix_flops_per_s", matrix_flops_per_s_},
                                        {"parameters", model_->num_parameters()},
                                        {"trained_parameters", count_trained(model_)},
                                        {"train_tokens", train_corpus_.num_tokens()},
                                        {"samples_per_epoch", order_.samples_per_epoch()}};
  log.add_start(start.dump());

  const ModelConfig& model = config_.model;
  log.say(fmt::format("{}: {} layers, {} wide, vocabulary {}, {} parameters, {} of them trained",
                      model.version,
                      model.n_layer,
                      model.n_embd,
                      model.vocab_size,
                      format_count(model_->num_parameters()),
                      format_count(count_trained(model_))));
  if (state_.step == 0 && (config_.init.from || !config_.optimizer.freeze.empty())) {
    log.say("trained and frozen tensors (also in " + run_dir + "/parameters.txt):\n" + parameters);
  }
  log.say(fmt::format("{}: {} tokens, {} windows of {} an epoch",
                      train_corpus_.prefix(),
                      format_count(train_corpus_.num_tokens()),
                      order_.samples_per_epoch(),
                      model.ctx_len));
  if (total_steps_) {
    log.say(fmt::format("{} steps of {} tokens, {:.2f} epochs",
                        *total_steps_,
                        config_.tokens_per_step(),
                        static_cast<double>(*total_steps_ * config_.batch_sequences()) /
                            static_cast<double>(order_.samples_per_epoch())));
  }
  log.say(
      fmt::format("{}{}, {} threads; matrix products reach {:.3g} GFLOP/s here, so mfu 100% would "
                  "be {:.0f} tok/s",
                  placement_.world_size == 1 ? "" : std::to_string(placement_.world_size) + " x ",
                  device_name(),
                  at::get_num_threads(),
                  matrix_flops_per_s_ / 1e9,
                  matrix_flops_per_s_ / flops_per_token_));
  // The last process has one of the largest shares.
  const int64_t rank = placement_.world_size - 1;
  log.say(
      memory_as_line({.model = model,
                      .micro_batch_size = micro_batch_rows(rank),
                      .micro_batches = micro_batches(rank),
                      .dtype = config_.train.dtype,
                      .recompute = config_.train.recompute,
                      .device = device_.runtime == nullptr ? PlanDevice::kCpu : PlanDevice::kCuda,
                      .processes = placement_.world_size,
                      .zero_stage = optimizer_->sharding().zero_stage,
                      .freeze = config_.optimizer.freeze}));
}

std::optional<RunEnd> Trainer::end() const {
  const TrainConfig& train = config_.train;
  if (const int signal = asked_to_stop(); signal != 0) {
    return RunEnd{.reason = std::string("SIG") + sigabbrev_np(signal) + " asked to stop",
                  .signal = signal};
  }
  if (total_steps_ && state_.step >= *total_steps_) {
    return RunEnd{.reason = config_.total_steps_key(order_.samples_per_epoch()) + " is reached"};
  }
  if (communicator_ == nullptr ? is_time_over() : agreed_.minutes_over) {
    return RunEnd{.reason = "train.total_minutes = " + to_config_text(*train.total_minutes) +
                            " are over"};
  }
  return std::nullopt;
}

std::string Trainer::device_name() const {
  return device_.runtime == nullptr ? "cpu" : device_.runtime->name();
}

int64_t Trainer::peak_memory_bytes() const {
  return device_.runtime == nullptr ? peak_resident_bytes()
                                    : device_.runtime->memory().peak_tensor_bytes;
}

bool Trainer::is_step_of(std::optional<int64_t> every) const {
  // At the end, too, whichever it is; a signal does not wait.
  const auto ended = end();
  return (ended && ended->signal == 0) || (every && state_.step % *every == 0);
}

bool Trainer::is_time_over() const {
  const auto& minutes = config_.train.total_minutes;
  return minutes && state_.elapsed_s >= 60 * *minutes;
}

bool Trainer::is_save_due() const {
  const auto& minutes = config_.train.save_every_minutes;
  return minutes && now_seconds() - saved_s_ >= 60 * *minutes;
}

bool Trainer::is_time_to_save() const {
  return communicator_ == nullptr ? is_save_due() : agreed_.save_due;
}

bool Trainer::is_work_due() const {
  const TrainConfig& train = config_.train;
  return end() || (validation_corpus_ && is_step_of(train.validate_every_steps)) ||
         is_step_of(config_.sample.every_steps) || is_step_of(train.save_every_steps) ||
         is_step_of(train.keep_every_steps) || is_time_to_save() ||
         (communicator_ != nullptr && is_step_of(config_.distributed.compare_weights_every_steps));
}

void Trainer::note_outlier(const SkippedStep& skipped, RunLog* log) const {
  if (log != nullptr) {
    log->add_skipped(skipped, wall_clock_seconds());
  }
  if (state_.outliers.num_in_a_row() == OutlierGuard::kMostInARow) {
    throw std::runtime_error(describe(skipped) + "; it is the " +
                             std::to_string(OutlierGuard::kMostInARow) +
                             "th in a row that was skipped, so it is not the steps: the loss has "
                             "changed for good. Look at the corpus there, or go on with a larger "
                             "train.skip_outliers_z or without it");
  }
}

StepRecord Trainer::record_of(LaunchedStep& launched, ProgressMeter& meter, RunLog* log) {
  const TrainConfig& train = config_.train;
  const StepResult result = result_of(launched);
  if (result.skipped) {
    note_outlier(*result.skipped, log);
  }
  StepRecord record =
      meter.finish_step({.step = launched.before.step + 1,
                         .total_steps = total_steps_,
                         .tokens = launched.before.tokens + config_.tokens_per_step(),
                         .loss = result.loss,
                         .lr = result.lr,
                         .grad_norm = result.grad_norm,
                         .memory_bytes = peak_memory_bytes(),
                         .elapsed_s = state_.elapsed_s,
                         .time = wall_clock_seconds()},
                        now_seconds(),
                        loader_->wait_seconds());
  if (launched.telemetry) {
    record.telemetry = numbers_of(*launched.telemetry);
  }
  if (record.tokens_per_s && matrix_flops_per_s_ > 0) {
    record.mfu = *record.tokens_per_s * flops_per_token_ / matrix_flops_per_s_;
  }
  if (train.total_minutes) {
    const double minutes_left_s = std::max(0.0, 60 * *train.total_minutes - state_.elapsed_s);
    record.seconds_left = std::min(record.seconds_left.value_or(minutes_left_s), minutes_left_s);
  }
  return record;
}

void Trainer::add_record(const StepRecord& record, bool is_logged, RunLog* log) const {
  if (log == nullptr) {
    return;
  }
  if (record.step == started_step_ + 1 || is_logged || record.validation_loss || record.telemetry) {
    log->add(record);
  } else {
    log->show(record);
  }
}

void Trainer::log_step(LaunchedStep& launched, ProgressMeter& meter, RunLog* log) {
  const StepRecord record = record_of(launched, meter, log);
  add_record(record, record.step % config_.train.log_every_steps == 0, log);
}

void Trainer::finish_step(LaunchedStep& launched, ProgressMeter& meter, RunLog* log) {
  const TrainConfig& train = config_.train;
  StepRecord record = record_of(launched, meter, log);
  const double pause_s = now_seconds();
  if (is_step_of(config_.distributed.compare_weights_every_steps)) {
    require_same_weights();
  }
  if (validation_corpus_ && is_step_of(train.validate_every_steps)) {
    require_finite_weights();
    record.validation_loss = validate();
  }
  add_record(record, is_step_of(train.log_every_steps), log);
  if (log != nullptr && config_.sample.every_steps && is_step_of(config_.sample.every_steps)) {
    require_finite_weights();
    write_sample(record, *log);
  }
  if (is_step_of(train.save_every_steps) || is_step_of(train.keep_every_steps) ||
      is_time_to_save()) {
    save(log);
  }
  meter.exclude_seconds(now_seconds() - pause_s);
}

std::optional<double> Trainer::validate() {
  std::optional<Evaluation> own;
  try {
    own = evaluate(model_,
                   *validation_corpus_,
                   {.ctx_len = config_.model.ctx_len,
                    .batch_size = micro_batch_rows(placement_.rank),
                    .max_tokens = config_.train.validation_tokens,
                    .share = placement_.rank,
                    .num_shares = placement_.world_size,
                    .progress = [](int64_t) { stop_if_asked(); }});
  } catch (const Stopped&) {
    // Then there is no loss to tell.
  }
  if (communicator_ == nullptr) {
    return own ? std::optional(own->loss) : std::nullopt;
  }
  // A signal to one of them stops all.
  if (communicator_->any_bits(own ? 0 : 1, "the end of a validation") != 0) {
    return std::nullopt;
  }
  const auto num_tokens = static_cast<double>(own->num_tokens);
  const at::Tensor sums = at::tensor({own->loss * num_tokens, num_tokens}, at::kDouble);
  communicator_->sum(sums, "the sum of validation losses");
  return sums[0].item<double>() / sums[1].item<double>();
}

void Trainer::write_sample(const StepRecord& record, RunLog& log) {
  const SampleConfig& sample = config_.sample;
  std::string text;
  try {
    generate_text(model_,
                  *tokenizer_,
                  {.prompt = sample.prompt,
                   .length = sample.length,
                   .sampling = {.temperature = sample.temperature, .top_p = sample.top_p},
                   .seed = static_cast<uint64_t>(config_.train.seed)},
                  [&](std::string_view part) {
                    stop_if_asked();
                    text += part;
                  });
  } catch (const Stopped&) {
    return;
  }
  log.add_sample(record, sample.prompt, text);
}

void Trainer::require_finite_weights() const {
  if (const std::string weight = optimizer_->first_nonfinite_weight(); !weight.empty()) {
    refuse_nonfinite(weight, state_.step, config_.train.run_dir);
  }
}

void Trainer::require_same_weights() const {
  if (communicator_ != nullptr) {
    rwkv::require_same_weights(model_, *communicator_);
  }
}

void Trainer::save(RunLog* log) {
  require_same_weights();
  say_saved(saver_->wait(), log);
  saver_->start(*optimizer_, state_);
  saved_step_ = state_.step;
  saved_s_ = now_seconds();
}

}  // namespace rwkv
