// A training run as a whole: what is trained, on what, for how long, and how. Read from a TOML file
// (see configs/) and "--set section.key=value" options, printed at the start of the run and kept in
// its checkpoints.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/sample_order.h"
#include "model/model_config.h"
#include "model/recompute_mode.h"
#include "train/lr_schedule.h"

namespace rwkv {

struct DataConfig {
  // Prefixes of binidx corpora, see data/binidx.h. `train` is required.
  std::string train;
  std::optional<std::string> validation = {};
  // A tokenizer spec (see data/tokenizer_registry.h) that the corpus' record must agree with.
  std::optional<std::string> tokenizer = {};
  SampleOrderKind order = SampleOrderKind::kShuffled;
  bool operator==(const DataConfig&) const = default;
};

// What happens to the rows of the embedding and the head that a larger vocabulary adds.
enum class VocabGrowth { kRefuse, kMean, kZero };

// Where the weights of a new run come from.
struct InitConfig {
  // A .pth or .safetensors file, a checkpoint or a run, of which the model's version and sizes are
  // taken; those that [model] gives must be the same. Absent: the version's initial values.
  std::optional<std::string> from = {};
  // Patterns (as of file names: *, ?, [a-z]) of tensors: those that may be missing in the file and
  // keep their initial values, and those of the file that are left out. Others are errors.
  std::vector<std::string> allow_missing = {};
  std::vector<std::string> allow_unexpected = {};
  VocabGrowth vocab_growth = VocabGrowth::kRefuse;
  // A file with the state that every sequence starts from, in training, validation and samples
  // (model/state_file.h). Absent: nothing read yet.
  std::optional<std::string> state = {};
  bool operator==(const InitConfig&) const = default;
};

// Of the forward and backward pass; master weights and optimizer moments are fp32 in both.
enum class TrainDtype { kFp32, kBf16 };

struct TrainConfig {
  std::string run_dir;         // required; checkpoints, configuration and metrics go there
  std::string device = "cpu";  // "cpu", "cuda" or "cuda:N"
  bool cuda_graph = true;      // on a GPU: the step is recorded once and replayed
  TrainDtype dtype = TrainDtype::kFp32;
  Recompute recompute = Recompute::kNone;  // the same bits with each
  int64_t seed = 1;                        // of initial weights and sample order; 0 or more
  // Sequences a step, or tokens a step (a multiple of model.ctx_len): exactly one is given.
  std::optional<int64_t> batch_size = {};
  std::optional<int64_t> batch_tokens = {};
  // Sequences in memory at once; divides the batch. Absent: the whole batch.
  std::optional<int64_t> micro_batch_size = {};
  // The length of the run: at least one is given, and the first to be reached ends it. Tokens and
  // epochs are rounded up to whole steps; minutes are of training, those before a restart included,
  // and the learning rate does not know of them.
  std::optional<int64_t> total_tokens = {};
  std::optional<int64_t> total_steps = {};
  std::optional<double> total_epochs = {};
  std::optional<double> total_minutes = {};
  std::optional<int64_t> validate_every_steps = {};  // absent: only at the end
  std::optional<int64_t> validation_tokens = {};     // absent: the whole validation corpus
  std::optional<int64_t> save_every_steps = {};      // both absent: only at the end
  std::optional<double> save_every_minutes = {};
  int64_t keep_checkpoints = 2;                  // newest ones kept; 1 or more
  std::optional<int64_t> keep_every_steps = {};  // and for good those of a multiple of this step
  int64_t log_every_steps = 10;                  // 1 or more
  bool tensorboard = true;                       // write event files
  // A look at every layer and head (model/telemetry.h); absent: none.
  std::optional<int64_t> telemetry_every_steps = {};
  std::optional<int64_t> threads = {};  // absent: all cores
  double l2wrap = 1e-4;                 // logit penalty, 0 or more; 0 is off
  // A step whose loss or gradient norm is more standard deviations above its mean is not applied
  // (train/outlier_guard.h); above 0; absent: all are.
  std::optional<double> skip_outliers_z = {};
  bool operator==(const TrainConfig&) const = default;
};

// AdamW and what is done to gradients before it.
struct OptimizerConfig {
  double beta1 = 0.9;        // 0 to below 1
  double beta2 = 0.99;       // 0 to below 1
  double eps = 1e-8;         // above 0
  double weight_decay = 0;   // 0 or more; on tensors with two or more dimensions above 1
  double clip_norm = 1.0;    // greatest global norm of the gradient, 0 or more; 0 is off
  bool layerwise_lr = true;  // RWKV's multiples of the rate for some classes of parameters
  // Patterns (as of file names) of tensors that are not trained, such as "blocks.0.*".
  std::vector<std::string> freeze = {};
  bool operator==(const OptimizerConfig&) const = default;
};

// Texts that the model writes during the run, with data.tokenizer, into samples.jsonl.
struct SampleConfig {
  std::optional<int64_t> every_steps = {};  // absent: none
  std::string prompt = "";                  // to continue; empty starts a document
  int64_t length = 100;                     // tokens, 1 or more
  double temperature = 1.0;                 // 0 or more
  double top_p = 0.9;                       // above 0, at most 1
  bool operator==(const SampleConfig&) const = default;
};

// Several processes that train together (train/distributed/communicator.h).
struct DistributedConfig {
  double timeout_s = 60;  // a process that is silent for longer is lost; 5 or more
  // Stage of ZeRO (train/buckets.h): 0, 1 or 2. 1 is the fastest on GPUs and on CPUs.
  int64_t zero = 1;
  int64_t compare_weights_every_steps = 500;  // 1 or more
  bool operator==(const DistributedConfig&) const = default;
};

struct RunConfig {
  // Here model.vocab_size, too, may be 0: the trainer takes it from the corpus' tokenizer record.
  // So may version be empty, n_layer and n_embd be 0, if init.from is given: its file says them.
  ModelConfig model;
  DataConfig data;
  InitConfig init;
  TrainConfig train;
  OptimizerConfig optimizer;
  LrSchedule schedule;
  SampleConfig sample;
  DistributedConfig distributed;

  // Throws std::invalid_argument starting with the key for a value out of range, a required one not
  // given, or values of two sections that do not go together. The lengths of warm-up and decay are
  // checked only if the run is not given in epochs; the trainer calls schedule.validate_for() then.
  void validate() const;

  // The rest asks for a configuration that validate() accepts.
  int64_t batch_sequences() const;        // sequences a step
  int64_t micro_batch_sequences() const;  // of them at once; divides batch_sequences()
  int64_t tokens_per_step() const;
  // The least of total_steps, total_tokens and total_epochs that are given, in steps; nothing if
  // only minutes end the run. `samples_per_epoch` is SampleOrder's; only total_epochs needs it.
  std::optional<int64_t> total_steps(int64_t samples_per_epoch) const;
  // The key that says it, with its value: "train.total_tokens = 3000000"; empty without one.
  std::string total_steps_key(int64_t samples_per_epoch) const;
  // Tokens of those steps, so that the schedule ends with the last of them. Without an end in steps
  // the greatest number: the schedule is constant then.
  int64_t total_tokens(int64_t samples_per_epoch) const;

  bool operator==(const RunConfig&) const = default;
};

// The file at `path`, if one is given, then the options in order (each "section.key=value"), then
// validate(). An option that sets one of several ways to say the same (batch_size, batch_tokens;
// total_tokens, total_steps, total_epochs) replaces the file's. Throws std::runtime_error if the
// file cannot be read; std::invalid_argument with "path:line: " or "--set ...: " before every error
// in what it says.
RunConfig load_run_config(const std::optional<std::string>& path,
                          std::span<const std::string> options);
// The same of a text, as it is kept in a checkpoint; `name` is what errors call it.
RunConfig parse_run_config(std::string_view text, const std::string& name);

// Every key with its comment; parse_run_config of it gives an equal RunConfig.
std::string to_toml(const RunConfig& config);

// Where a run is about to go on.
struct ResumePoint {
  std::string checkpoint;  // its path, for the error text
  int64_t tokens_seen = 0;
  int64_t samples_per_epoch = 0;
};

// Throws std::invalid_argument, with every differing key and both its values, unless `now` goes on
// with the run that `saved` began; both with the trainer's resolved values (vocab_size, dim_ffn).
// What decides over the weights must be equal. What only decides over speed, logging, validation
// and saving may differ: run_dir, device, cuda_graph, recompute, threads, [distributed] and
// micro_batch_size
// (whose change can change the last bits), skip_outliers_z (or a run that skips all could not go
// on), total_minutes, what is logged, looked at, saved, kept and
// sampled how often, data.validation and data.tokenizer. So may paths: data.train and init.state,
// whose content the trainer compares, and init.from, which is not read again. So may the length of
// the run, as long as the learning rate up to the resume point stays what it was: with a constant
// rate, with warmup_stable_decay before its decay, with any kind during warm-up.
void check_matches_checkpoint(const RunConfig& now,
                              const RunConfig& saved,
                              const ResumePoint& resume);

}  // namespace rwkv
