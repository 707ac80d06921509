// A training run from its configuration to its last checkpoint.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "data/batch_loader.h"
#include "data/binidx.h"
#include "data/sample_order.h"
#include "model/rwkv_model.h"
#include "train/checkpoint.h"
#include "train/metrics.h"
#include "train/optimizer.h"
#include "train/run_config.h"

namespace rwkv {

// Fills in what a configuration leaves to the corpus (vocab_size, from the tokenizer record) and to
// the model's version (dim_att, dim_ffn). Throws std::invalid_argument or std::runtime_error naming
// both sides where corpus, tokenizer and configuration contradict each other.
RunConfig resolve_run_config(RunConfig config);

struct StepResult {
  double loss = 0;       // mean over the step's tokens, nats
  double grad_norm = 0;  // before clipping
  double lr = 0;
};

// What a run leaves in train.run_dir: config.toml (resolved), metrics.jsonl, checkpoints/. A run
// that finds a checkpoint there goes on from it: later losses and final weights are bit for bit
// those of a run that was never interrupted, on the same number of threads.
class Trainer {
 public:
  // Opens corpora, builds the model, goes on from the newest checkpoint if there is one.
  explicit Trainer(const RunConfig& config);

  // Trains to the end, validating, saving and logging on the way.
  void run();

  // One update on the next batch. Throws std::runtime_error before the update, naming the step, the
  // first bad tensor and the sample numbers, if loss or gradient is not finite.
  StepResult step();

  RwkvModel model() const { return model_; }
  const TrainerState& state() const { return state_; }
  int64_t total_steps() const { return total_steps_; }

 private:
  void start();
  void log_start() const;
  double accumulate_micro_batch();
  void check_finite(const StepResult& result) const;
  double validate();
  void save();

  RunConfig config_;
  BinidxFile train_corpus_;
  std::optional<BinidxFile> validation_corpus_;
  std::optional<std::string> tokenizer_identity_;  // of what made the corpus, if it is known
  SampleOrder order_;
  int64_t total_steps_;
  RwkvModel model_;
  std::unique_ptr<Optimizer> optimizer_;
  TrainerState state_;
  std::unique_ptr<BatchLoader> loader_;
};

}  // namespace rwkv
