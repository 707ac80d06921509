#include "train/run_config.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "data/atomic_file.h"
#include "train/config_file.h"
#include "train/config_value.h"
#include "train/gpu.h"

namespace rwkv {
namespace {

// Ours have 3 KB.
constexpr uint64_t kMaxFileBytes = 1 << 20;
constexpr const char* kBatchChoice = "batch";
constexpr const char* kLengthChoice = "length";
constexpr auto kMayDiffer = OnResume::kMayDiffer;
constexpr auto kMustMatch = OnResume::kMustMatch;

ConfigSection model_section(ModelConfig& m) {
  return {
      "model",
      {
          {"version",
           &m.version,
           "version of the architecture: \"rwkv4\", \"rwkv5\" (5.2), \"rwkv6\" or \"rwkv7\""},
          {"n_layer", AbsentIfZero{&m.n_layer}, "blocks; absent: init.from's, or 6"},
          {"n_embd",
           AbsentIfZero{&m.n_embd},
           "width of the residual stream; absent: as n_layer, or 384"},
          {"dim_att", AbsentIfZero{&m.dim_att}, "width of time mixing; absent: n_embd"},
          {"dim_ffn", AbsentIfZero{&m.dim_ffn}, "width of channel mixing; absent: the version's"},
          {"head_size", AbsentIfZero{&m.head_size}, "channels a head; absent: the version's"},
          {"rank_mix",
           AbsentIfZero{&m.rank_mix},
           "of rwkv6's time_maa_w1, time_maa_w2; absent: the author's"},
          {"rank_decay",
           AbsentIfZero{&m.rank_decay},
           "of the decay's factors (rwkv6, rwkv7); absent: the author's"},
          {"rank_iclr", AbsentIfZero{&m.rank_iclr}, "of rwkv7's a1, a2; absent: the author's"},
          {"rank_value", AbsentIfZero{&m.rank_value}, "the same of v1, v2"},
          {"rank_gate", AbsentIfZero{&m.rank_gate}, "the same of g1, g2"},
          {"vocab_size",
           AbsentIfZero{&m.vocab_size},
           "tokens; absent: init.from's, or the corpus' tokenizer's"},
          {"ctx_len", &m.ctx_len, "tokens of a training sequence; 1 or more"},
      }};
}

ConfigSection data_section(DataConfig& d) {
  return {"data",
          {
              {"train",
               &d.train,
               "PREFIX of PREFIX.bin and PREFIX.idx to train on; required",
               kMayDiffer},
              {"validation", &d.validation, "prefix to validate on; absent: none", kMayDiffer},
              {"tokenizer", &d.tokenizer, "must be the corpus' if given, as \"bytes\"", kMayDiffer},
              {"order",
               by_name<SampleOrderKind>(&d.order,
                                        {{"shuffled", SampleOrderKind::kShuffled},
                                         {"sequential", SampleOrderKind::kSequential},
                                         {"rwkv_lm", SampleOrderKind::kRwkvLm}}),
               "of sequences: shuffled, sequential or rwkv_lm"},
          }};
}

ConfigSection init_section(InitConfig& i) {
  return {"init",
          {
              {"from",
               &i.from,
               "weights to begin with: .pth, .safetensors, a checkpoint, a run",
               kMayDiffer},
              {"allow_missing", &i.allow_missing, "patterns of tensors that the file may lack"},
              {"allow_unexpected", &i.allow_unexpected, "patterns of its tensors to leave out"},
              {"vocab_growth",
               by_name<VocabGrowth>(&i.vocab_growth,
                                    {{"refuse", VocabGrowth::kRefuse},
                                     {"mean", VocabGrowth::kMean},
                                     {"zero", VocabGrowth::kZero}}),
               "new rows of emb and head: the mean of the old, or zero; refuse: an error"},
              {"state",
               &i.state,
               "file of the state that every sequence starts from; absent: none",
               kMayDiffer},
          }};
}

ConfigSection train_section(TrainConfig& t) {
  return {
      "train",
      {
          {"run_dir", &t.run_dir, "folder of checkpoints and metrics; required", kMayDiffer},
          {"device", &t.device, "cpu, cuda, or cuda:N for GPU N", kMayDiffer},
          {"cuda_graph", &t.cuda_graph, "on a GPU, record the step once and replay it", kMayDiffer},
          {"dtype",
           by_name<TrainDtype>(&t.dtype,
                               {{"fp32", TrainDtype::kFp32}, {"bf16", TrainDtype::kBf16}}),
           "of forward and backward: fp32 or bf16; master weights are fp32"},
          {"recompute",
           by_name<Recompute>(&t.recompute,
                              {{"none", Recompute::kNone},
                               {"mixes", Recompute::kMixes},
                               {"blocks", Recompute::kBlocks}}),
           "in backward, for memory: none, mixes (some), blocks (most)",
           kMayDiffer},
          {"seed", &t.seed, "of initial weights and order; 0 or more"},
          {"batch_size", &t.batch_size, "sequences a step; or", kMustMatch, kBatchChoice},
          {"batch_tokens",
           &t.batch_tokens,
           "tokens a step, a multiple of ctx_len",
           kMustMatch,
           kBatchChoice},
          {"micro_batch_size",
           &t.micro_batch_size,
           "sequences in memory at once, a divisor of the batch; absent: all",
           kMayDiffer},
          {"total_tokens",
           &t.total_tokens,
           "length of the run; the first end reached counts",
           kMustMatch,
           kLengthChoice},
          {"total_steps", &t.total_steps, "length of the run", kMustMatch, kLengthChoice},
          {"total_epochs",
           &t.total_epochs,
           "length of the run in passes over the corpus, above 0",
           kMustMatch,
           kLengthChoice},
          {"total_minutes",
           &t.total_minutes,
           "of training, above 0; the learning rate does not know of it",
           kMayDiffer},
          {"validate_every_steps",
           &t.validate_every_steps,
           "1 or more; absent: only at the end",
           kMayDiffer},
          {"validation_tokens",
           &t.validation_tokens,
           "tokens of a validation, ctx_len or more; absent: all",
           kMayDiffer},
          {"save_every_steps",
           &t.save_every_steps,
           "1 or more; absent: only at the end",
           kMayDiffer},
          {"save_every_minutes", &t.save_every_minutes, "above 0; also, or instead", kMayDiffer},
          {"keep_checkpoints", &t.keep_checkpoints, "newest ones kept; 1 or more", kMayDiffer},
          {"keep_every_steps",
           &t.keep_every_steps,
           "checkpoints of these steps are kept for good; absent: none",
           kMayDiffer},
          {"log_every_steps", &t.log_every_steps, "1 or more", kMayDiffer},
          {"tensorboard", &t.tensorboard, "write event files for TensorBoard", kMayDiffer},
          {"telemetry_every_steps",
           &t.telemetry_every_steps,
           "look at each layer's state and decay; absent: never",
           kMayDiffer},
          {"threads",
           &t.threads,
           "1 or more; absent: all cores; equal bits need an equal number",
           kMayDiffer},
          {"l2wrap", &t.l2wrap, "penalty that keeps logits near 0; 0 or more, 0 is off"},
          {"skip_outliers_z",
           &t.skip_outliers_z,
           "skip steps so far above others; above 0, such as 6; absent: none",
           kMayDiffer},
      }};
}

ConfigSection optimizer_section(OptimizerConfig& o) {
  return {"optimizer",
          {
              {"beta1", &o.beta1, "AdamW: decay of the first moment, 0 to below 1"},
              {"beta2", &o.beta2, "AdamW: decay of the second moment, 0 to below 1"},
              {"eps", &o.eps, "AdamW: added to the root of the second moment, above 0"},
              {"weight_decay", &o.weight_decay, "on matrices; 0 or more"},
              {"clip_norm", &o.clip_norm, "greatest norm of the gradient; 0 or more, 0 is off"},
              {"layerwise_lr", &o.layerwise_lr, "RWKV's multiples of the rate by parameter class"},
              {"freeze", &o.freeze, "patterns of tensors not to train, such as [\"blocks.0.*\"]"},
          }};
}

ConfigSection schedule_section(LrSchedule& s) {
  return {"schedule",
          {
              {"kind",
               by_name<ScheduleKind>(&s.kind,
                                     {{"exponential", ScheduleKind::kExponential},
                                      {"linear", ScheduleKind::kLinear},
                                      {"cosine", ScheduleKind::kCosine},
                                      {"constant", ScheduleKind::kConstant},
                                      {"warmup_stable_decay", ScheduleKind::kWarmupStableDecay}}),
               "exponential, linear, cosine, constant or warmup_stable_decay"},
              {"lr_init", &s.lr_init, "learning rate after warm-up; 0 or more"},
              {"lr_final", &s.lr_final, "learning rate at the end; not used by constant"},
              {"warmup_tokens", &s.warmup_tokens, "tokens of rising rate; 0 or more"},
              {"decay_tokens", &s.decay_tokens, "tokens of warmup_stable_decay's last decay"},
              {"warmup_start", &s.warmup_start, "fraction of lr_init at the first step, 0 to 1"},
          }};
}

ConfigSection sample_section(SampleConfig& s) {
  return {
      "sample",
      {
          {"every_steps", &s.every_steps, "a text every so many steps; absent: none", kMayDiffer},
          {"prompt", &s.prompt, "what it continues; empty: starts a document", kMayDiffer},
          {"length", &s.length, "its tokens; 1 or more", kMayDiffer},
          {"temperature", &s.temperature, "0 or more; 0: the most likely tokens", kMayDiffer},
          {"top_p", &s.top_p, "above 0, at most 1: the likeliest tokens", kMayDiffer},
      }};
}

ConfigSection distributed_section(DistributedConfig& d) {
  return {"distributed",
          {
              {"timeout_s",
               &d.timeout_s,
               "seconds; a process that is silent for longer is lost; 5 or more",
               kMayDiffer},
              {"zero",
               &d.zero,
               "ZeRO: processes share 0: nothing; 1: moments, masters; 2: gradients, too",
               kMayDiffer},
              {"compare_weights_every_steps",
               &d.compare_weights_every_steps,
               "also before a save",
               kMayDiffer},
          }};
}

// The table of all keys, over the fields of `config`.
std::vector<ConfigSection> sections_of(RunConfig& config) {
  return {model_section(config.model),
          data_section(config.data),
          init_section(config.init),
          train_section(config.train),
          optimizer_section(config.optimizer),
          schedule_section(config.schedule),
          sample_section(config.sample),
          distributed_section(config.distributed)};
}

void require_given(std::string_view key, const std::string& value, const char* example) {
  if (value.empty()) {
    throw std::invalid_argument(std::string(key) + " is not given; set it to " + example);
  }
}

// Checks that one of several ways to say the same is given: exactly one, or at least one. `ways`
// are keys and whether each is.
enum class Ways { kExclusive, kTogether };
void require_one(Ways mode, const std::vector<std::pair<std::string, bool>>& ways) {
  std::string keys;
  std::string first_given;
  int64_t num_given = 0;
  for (const auto& [key, given] : ways) {
    keys += (keys.empty() ? "" : ", ") + key;
    num_given += given ? 1 : 0;
    first_given = given && first_given.empty() ? key : first_given;
  }
  if (num_given == 0) {
    throw std::invalid_argument(ways.front().first + " is not given; give one of " + keys);
  }
  if (num_given > 1 && mode == Ways::kExclusive) {
    throw std::invalid_argument(first_given + " is not given alone; give only one of " + keys);
  }
}

// Times beyond that nobody means, and they would not fit the arithmetic.
void require_minutes(const char* key, const std::optional<double>& minutes) {
  if (minutes) {
    require_in_range(1e-6, 1e8, key, *minutes);
  }
}

void validate_names(const DataConfig& data, const InitConfig& init) {
  require_given("data.train", data.train, "the prefix of a .bin and .idx pair");
  for (const auto& [key, value] : {std::pair("data.validation", data.validation),
                                   std::pair("data.tokenizer", data.tokenizer),
                                   std::pair("init.from", init.from),
                                   std::pair("init.state", init.state)}) {
    if (value && value->empty()) {
      reject_value(key, "\"\"", "is empty; name it, or leave the key out");
    }
  }
}

// No machine has more cores, and no batch more sequences.
constexpr int64_t kMostThreads = 4096;
constexpr int64_t kMostSequences = int64_t{1} << 31;

void validate_train(const TrainConfig& t) {
  require_given("train.run_dir", t.run_dir, "a folder for checkpoints and metrics");
  if (!is_device_name(t.device)) {
    reject_value("train.device",
                 to_config_text(std::string_view(t.device)),
                 "expected \"cpu\", \"cuda\", or \"cuda:1\" for the second GPU");
  }
  require_at_least(0, "train.seed", t.seed);
  require_one(Ways::kExclusive,
              {{"train.batch_size", t.batch_size.has_value()},
               {"train.batch_tokens", t.batch_tokens.has_value()}});
  require_at_least(1, "train.batch_size", t.batch_size);
  require_at_least(1, "train.batch_tokens", t.batch_tokens);
  require_at_least(1, "train.micro_batch_size", t.micro_batch_size);
  require_one(Ways::kTogether,
              {{"train.total_tokens", t.total_tokens.has_value()},
               {"train.total_steps", t.total_steps.has_value()},
               {"train.total_epochs", t.total_epochs.has_value()},
               {"train.total_minutes", t.total_minutes.has_value()}});
  require_at_least(1, "train.total_tokens", t.total_tokens);
  require_at_least(1, "train.total_steps", t.total_steps);
  if (t.total_epochs) {
    // More epochs than that would not fit the arithmetic, nor a life.
    require_in_range(1e-9, 1e6, "train.total_epochs", *t.total_epochs);
  }
  require_at_least(1, "train.validate_every_steps", t.validate_every_steps);
  require_at_least(1, "train.validation_tokens", t.validation_tokens);
  require_at_least(1, "train.save_every_steps", t.save_every_steps);
  require_minutes("train.total_minutes", t.total_minutes);
  require_minutes("train.save_every_minutes", t.save_every_minutes);
  require_at_least(1, "train.keep_checkpoints", t.keep_checkpoints);
  require_at_least(1, "train.keep_every_steps", t.keep_every_steps);
  require_at_least(1, "train.log_every_steps", t.log_every_steps);
  require_at_least(1, "train.telemetry_every_steps", t.telemetry_every_steps);
  require_at_least(1, "train.threads", t.threads);
  for (const auto& [key, value, most] :
       {std::tuple("train.threads", t.threads, kMostThreads),
        std::tuple("train.batch_size", t.batch_size, kMostSequences),
        std::tuple("train.micro_batch_size", t.micro_batch_size, kMostSequences)}) {
    if (value && *value > most) {
      reject_value(key, to_config_text(*value), "must be at most " + to_config_text(most));
    }
  }
  require_in_range(0, std::numeric_limits<double>::infinity(), "train.l2wrap", t.l2wrap);
  if (const auto& z = t.skip_outliers_z; z && !(*z > 0 && std::isfinite(*z))) {
    reject_value("train.skip_outliers_z", to_config_text(*z), "must be a finite number above 0");
  }
}

void validate_optimizer(const OptimizerConfig& o) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const double below_one = std::nextafter(1.0, 0.0);
  for (const auto& [key, beta] :
       {std::pair("optimizer.beta1", o.beta1), std::pair("optimizer.beta2", o.beta2)}) {
    if (!(beta >= 0 && beta <= below_one)) {
      reject_value(key, to_config_text(beta), "must lie from 0.0 to below 1.0");
    }
  }
  if (!(o.eps > 0 && std::isfinite(o.eps))) {
    reject_value("optimizer.eps", to_config_text(o.eps), "must be a finite number above 0");
  }
  require_in_range(0, kInfinity, "optimizer.weight_decay", o.weight_decay);
  require_in_range(0, kInfinity, "optimizer.clip_norm", o.clip_norm);
}

void validate_sample(const SampleConfig& s) {
  require_at_least(1, "sample.every_steps", s.every_steps);
  require_at_least(1, "sample.length", s.length);
  require_in_range(0, std::numeric_limits<double>::max(), "sample.temperature", s.temperature);
  if (!(s.top_p > 0 && s.top_p <= 1)) {
    reject_value("sample.top_p", to_config_text(s.top_p), "must be above 0 and at most 1");
  }
}

// What says how to begin with a file, where there is none.
void validate_init(const InitConfig& init) {
  const auto reject_without_from = [&](bool given, const char* key) {
    if (given && !init.from) {
      throw std::invalid_argument(
          std::string(key) +
          " is given without init.from, and would do nothing; give the file "
          "to begin with, or leave it out");
    }
  };
  reject_without_from(!init.allow_missing.empty(), "init.allow_missing");
  reject_without_from(!init.allow_unexpected.empty(), "init.allow_unexpected");
  reject_without_from(init.vocab_growth != VocabGrowth::kRefuse, "init.vocab_growth");
}

// Two sections at a time: what each accepts alone, but not together.
void validate_together(const RunConfig& config) {
  const TrainConfig& t = config.train;
  const int64_t ctx_len = config.model.ctx_len;
  const std::string ctx_len_text = "model.ctx_len = " + to_config_text(ctx_len);
  if (t.batch_tokens && *t.batch_tokens % ctx_len != 0) {
    const int64_t below = std::max(*t.batch_tokens / ctx_len, int64_t{1}) * ctx_len;
    reject_value("train.batch_tokens",
                 to_config_text(*t.batch_tokens),
                 "is not a multiple of " + ctx_len_text + "; use " + to_config_text(below));
  }
  // Sizes that are valid alone have a product within 64 bits.
  const int64_t tokens = config.batch_sequences() * ctx_len;
  if (t.micro_batch_size && config.batch_sequences() % *t.micro_batch_size != 0) {
    reject_value("train.micro_batch_size",
                 to_config_text(*t.micro_batch_size),
                 "does not divide the batch of " + to_config_text(config.batch_sequences()) +
                     " sequences; use a divisor of it");
  }
  int64_t total = 0;
  if (t.total_steps && __builtin_mul_overflow(*t.total_steps, tokens, &total)) {
    reject_value("train.total_steps",
                 to_config_text(*t.total_steps),
                 "times the tokens of a step does not fit in 64 bits; use fewer");
  }
  if (t.total_tokens && *t.total_tokens > std::numeric_limits<int64_t>::max() - tokens) {
    reject_value("train.total_tokens",
                 to_config_text(*t.total_tokens),
                 "rounded up to whole steps does not fit in 64 bits; use fewer");
  }
  if (!config.data.validation) {
    for (const auto& [key, value] :
         {std::pair("train.validate_every_steps", t.validate_every_steps),
          std::pair("train.validation_tokens", t.validation_tokens)}) {
      if (value) {
        reject_value(key,
                     to_config_text(*value),
                     "there is no data.validation to validate on; give one, or leave the key out");
      }
    }
  }
  if (t.validation_tokens && *t.validation_tokens < ctx_len) {
    reject_value("train.validation_tokens",
                 to_config_text(*t.validation_tokens),
                 "is less than one sequence of " + ctx_len_text + "; use that or more");
  }
  if (config.sample.every_steps && !config.data.tokenizer) {
    reject_value("sample.every_steps",
                 to_config_text(*config.sample.every_steps),
                 "there is no data.tokenizer to read the text with; give it, or leave the key out");
  }
  const bool ends_in_steps = t.total_steps || t.total_tokens || t.total_epochs;
  if (!ends_in_steps && config.schedule.kind != ScheduleKind::kConstant) {
    reject_value("train.total_minutes",
                 to_config_text(*t.total_minutes),
                 "is the only end of the run, and the learning rate must know where it ends; give "
                 "train.total_steps or total_tokens too, or schedule.kind = \"constant\"");
  }
  if (!t.total_epochs) {
    config.schedule.validate_for(config.total_tokens(0));
  }
}

// Rounds up; overflow-free for n >= 1.
int64_t ceil_div(int64_t n, int64_t d) {
  return (n - 1) / d + 1;
}

// An end of a run in steps, and the key that asks for it.
struct RunEndKey {
  int64_t steps;
  std::string key;
};

std::vector<RunEndKey> ends_of(const RunConfig& config, int64_t samples_per_epoch) {
  const TrainConfig& t = config.train;
  std::vector<RunEndKey> ends;
  if (t.total_steps) {
    ends.push_back({*t.total_steps, "train.total_steps = " + to_config_text(*t.total_steps)});
  }
  if (t.total_tokens) {
    ends.push_back({ceil_div(*t.total_tokens, config.tokens_per_step()),
                    "train.total_tokens = " + to_config_text(*t.total_tokens)});
  }
  if (t.total_epochs) {
    // Whole samples first: 1.1 * 10 is a hair above 11, which must not become a step of its own.
    const int64_t samples = std::llround(*t.total_epochs * static_cast<double>(samples_per_epoch));
    ends.push_back({ceil_div(std::max(samples, int64_t{1}), config.batch_sequences()),
                    "train.total_epochs = " + to_config_text(*t.total_epochs)});
  }
  return ends;
}

const RunEndKey& first_of(const std::vector<RunEndKey>& ends) {
  return *std::min_element(
      ends.begin(), ends.end(), [](const auto& a, const auto& b) { return a.steps < b.steps; });
}

// What a file leaves out where no weights say it.
void fill_absent(ModelConfig& model) {
  const ModelConfig defaults;
  model.version = model.version.empty() ? defaults.version : model.version;
  model.n_layer = model.n_layer == 0 ? defaults.n_layer : model.n_layer;
  model.n_embd = model.n_embd == 0 ? defaults.n_embd : model.n_embd;
}

template <typename Read>
RunConfig read_and_validate(const Read& read) {
  RunConfig config;
  config.model = {.version = "", .n_layer = 0, .n_embd = 0};
  ConfigReader reader(sections_of(config));
  read(reader);
  if (!config.init.from) {
    fill_absent(config.model);
  }
  try {
    config.validate();
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(reader.with_place(error.what()));
  }
  return config;
}

// Whether the learning rates of the tokens already seen are those of a run of the other length.
bool same_past(const RunConfig& now, const RunConfig& saved, const ResumePoint& resume) {
  const int64_t total_now = now.total_tokens(resume.samples_per_epoch);
  const int64_t total_saved = saved.total_tokens(resume.samples_per_epoch);
  const auto rate = [&](int64_t total) { return saved.schedule.lr(resume.tokens_seen, total); };
  // In a schedule that depends on the length, two lengths that agree on the last rate agree on all
  // before it, unless that rate is past the end of one of them.
  return total_now == total_saved ||
         (total_now >= resume.tokens_seen && rate(total_now) == rate(total_saved));
}

}  // namespace

void RunConfig::validate() const {
  // What the corpus or init.from will say is checked when they have.
  ModelConfig given = model;
  given.vocab_size = model.vocab_size == 0 ? 1 : model.vocab_size;
  if (init.from) {
    fill_absent(given);
  }
  given.validate();
  validate_names(data, init);
  validate_init(init);
  validate_train(train);
  validate_optimizer(optimizer);
  schedule.validate();
  validate_sample(sample);
  require_in_range(5, 86'400, "distributed.timeout_s", distributed.timeout_s);
  require_at_least(
      1, "distributed.compare_weights_every_steps", distributed.compare_weights_every_steps);
  if (distributed.zero < 0 || distributed.zero > 2) {
    reject_value("distributed.zero", to_config_text(distributed.zero), "must be 0, 1 or 2");
  }
  validate_together(*this);
}

int64_t RunConfig::batch_sequences() const {
  return train.batch_size ? *train.batch_size : *train.batch_tokens / model.ctx_len;
}

int64_t RunConfig::micro_batch_sequences() const {
  return train.micro_batch_size.value_or(batch_sequences());
}

int64_t RunConfig::tokens_per_step() const {
  return batch_sequences() * model.ctx_len;
}

std::optional<int64_t> RunConfig::total_steps(int64_t samples_per_epoch) const {
  const auto ends = ends_of(*this, samples_per_epoch);
  return ends.empty() ? std::nullopt : std::optional(first_of(ends).steps);
}

std::string RunConfig::total_steps_key(int64_t samples_per_epoch) const {
  const auto ends = ends_of(*this, samples_per_epoch);
  return ends.empty() ? "" : first_of(ends).key;
}

int64_t RunConfig::total_tokens(int64_t samples_per_epoch) const {
  const auto steps = total_steps(samples_per_epoch);
  return steps ? *steps * tokens_per_step() : std::numeric_limits<int64_t>::max();
}

RunConfig load_run_config(const std::optional<std::string>& path,
                          std::span<const std::string> options) {
  return read_and_validate([&](ConfigReader& reader) {
    if (path) {
      reader.read(read_text_file(*path, kMaxFileBytes), *path);
    }
    for (const std::string& option : options) {
      reader.apply_option(option);
    }
  });
}

RunConfig parse_run_config(std::string_view text, const std::string& name) {
  return read_and_validate([&](ConfigReader& reader) { reader.read(text, name); });
}

std::string to_toml(const RunConfig& config) {
  RunConfig copy = config;
  return to_toml(sections_of(copy));
}

void check_matches_checkpoint(const RunConfig& now,
                              const RunConfig& saved,
                              const ResumePoint& resume) {
  RunConfig now_copy = now;
  RunConfig saved_copy = saved;
  const auto now_sections = sections_of(now_copy);
  const auto saved_sections = sections_of(saved_copy);
  const bool same_batch = now.batch_sequences() == saved.batch_sequences();
  // The lengths of runs of other batches or sequences cannot be compared; those are listed anyway.
  const bool same_length =
      !same_batch || now.model.ctx_len != saved.model.ctx_len || same_past(now, saved, resume);
  std::string differing;
  for (size_t s = 0; s < now_sections.size(); ++s) {
    for (size_t f = 0; f < now_sections[s].fields.size(); ++f) {
      const ConfigField& field = now_sections[s].fields[f];
      const auto value = to_toml_value(field.target);
      const auto saved_value = to_toml_value(saved_sections[s].fields[f].target);
      if (field.on_resume == OnResume::kMayDiffer || value == saved_value ||
          (field.choice == kBatchChoice && same_batch) ||
          (field.choice == kLengthChoice && same_length)) {
        continue;
      }
      differing += "\n  " + now_sections[s].name + "." + field.key + ": " +
                   saved_value.value_or("not given") + " in the checkpoint, now " +
                   value.value_or("not given");
    }
  }
  if (!differing.empty()) {
    throw std::invalid_argument(
        resume.checkpoint + ": cannot go on with another configuration than the run began with:" +
        differing + "\nSet them back to go on, or start a new run in another train.run_dir");
  }
}

}  // namespace rwkv
