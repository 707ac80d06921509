// A training run from its configuration to its last checkpoint.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "data/batch_loader.h"
#include "data/binidx.h"
#include "data/sample_order.h"
#include "data/tokenizer.h"
#include "model/rwkv_model.h"
#include "train/checkpoint.h"
#include "train/checkpoint_saver.h"
#include "train/device.h"
#include "train/distributed/communicator.h"
#include "train/distributed/placement.h"
#include "train/metrics.h"
#include "train/optimizer.h"
#include "train/outlier_guard.h"
#include "train/run_config.h"
#include "train/run_folder.h"
#include "train/run_log.h"
#include "train/step_runner.h"

namespace rwkv {

struct StepResult {
  double loss = 0;       // mean over the step's tokens, nats
  double grad_norm = 0;  // before clipping
  double lr = 0;
  std::optional<SkippedStep> skipped = {};  // an outlier, which changed no weight
};

// Why a run ended: "train.total_steps = 800 reached", and the signal if it was one.
struct RunEnd {
  std::string reason;
  int signal = 0;  // 0: none
};

// What a run leaves in train.run_dir is in train/run_folder.h. A run that finds a checkpoint there
// goes on from it: later losses and final weights are bit for bit those of a run that was never
// interrupted, on the same number of threads.
class Trainer {
 public:
  // Takes the run's folder, opens corpora, builds the model, goes on from the newest checkpoint if
  // there is one. Throws std::invalid_argument or std::runtime_error, also if another program
  // trains in the folder.
  // `placement` is this process's among those that make the run together; the first of them writes
  // the folder.
  explicit Trainer(const RunConfig& config, const Placement& placement = {});
  // The run as it was before `step`, to do it again: from the newest checkpoint before it, or from
  // the start. Nothing in the folder is changed.
  static Trainer before_step(const RunConfig& config, int64_t step);

  // Trains to the end, validating, saving and logging on the way.
  RunEnd run();

  // One update on the next batch; nothing, and no update, if a signal asked to stop meanwhile.
  // Throws std::runtime_error before the update, naming the step, the first bad tensor and the
  // sample numbers, if loss or gradient is not finite.
  std::optional<StepResult> step();

  // Does the next step without its update, looks at the result of every op, and says what it found:
  // the loss of each sample, the gradient, the first op whose result is not finite.
  std::string replay();

  RwkvModel model() const { return model_; }
  const TrainerState& state() const { return state_; }
  std::optional<int64_t> total_steps() const { return total_steps_; }

 private:
  enum class Purpose { kTrain, kReplay };
  Trainer(const RunConfig& config,
          const Placement& placement,
          Purpose purpose,
          std::optional<int64_t> before_step);

  // Of a micro-batch.
  struct Samples {
    int64_t first = 0;
    int64_t rows = 0;
  };
  template <typename Work>
  auto announcing(const Work& work);
  void start(std::optional<int64_t> before_step);
  void prepare(std::optional<int64_t> before_step);
  void make_initial_weights();
  std::optional<std::string> choose_checkpoint(std::optional<int64_t> before_step);
  void write_start(RunLog& log) const;
  bool is_first() const { return placement_.rank == 0; }
  int64_t first_share(int64_t rank) const;  // of the step's sequences, that process's first
  int64_t share(int64_t rank) const;        // and how many are its own
  int64_t micro_batch_rows(int64_t rank) const;
  int64_t micro_batches(int64_t rank) const;
  int64_t most_micro_batches() const;  // of any process
  bool can_record() const;
  RunEnd run_steps();
  // What all processes do at this step, whichever of them has the reason.
  void agree();
  int asked_to_stop() const;
  // A step that the device may still be at.
  struct LaunchedStep {
    TrainerState before;
    double lr = 0;
    OutlierLimits limits;
    PendingNumbers numbers;
    std::optional<ModelTelemetry> telemetry = {};
  };
  Samples add_micro_batch(std::optional<ModelTelemetry>* telemetry = nullptr);
  std::optional<LaunchedStep> launch_step();  // nothing if a signal asked to stop meanwhile
  StepResult result_of(LaunchedStep& launched);
  std::string where_not_finite(const StepResult& result, bool is_newest) const;
  std::string samples_not_finite(bool is_newest) const;
  std::string device_name() const;
  int64_t peak_memory_bytes() const;
  std::optional<RunEnd> end() const;
  bool is_step_of(std::optional<int64_t> every) const;
  bool is_time_over() const;
  bool is_save_due() const;
  bool is_time_to_save() const;
  bool is_work_due() const;  // on the weights as they are after the last launched step
  StepRecord record_of(LaunchedStep& launched, ProgressMeter& meter, RunLog* log);
  void note_outlier(const SkippedStep& skipped, RunLog* log) const;
  void add_record(const StepRecord& record, bool is_logged, RunLog* log) const;
  void log_step(LaunchedStep& launched, ProgressMeter& meter, RunLog* log);
  void finish_step(LaunchedStep& launched, ProgressMeter& meter, RunLog* log);
  std::optional<double> validate();  // nothing if a signal asked to stop meanwhile
  void write_sample(const StepRecord& record, RunLog& log);
  // Throws std::runtime_error if the last update left a weight that is not finite.
  void require_finite_weights() const;
  // Throws DistributedError if processes that should have the same weights do not.
  void require_same_weights() const;
  // Begins to save, once the save before is done.
  void save(RunLog* log);

  RunConfig config_;
  Placement placement_;
  std::optional<RunLock> lock_;
  BinidxFile train_corpus_;
  std::optional<BinidxFile> validation_corpus_;
  std::optional<std::string> tokenizer_identity_;  // of the corpora, if it is known
  std::unique_ptr<Tokenizer> tokenizer_;           // of samples
  SampleOrder order_;
  std::optional<int64_t> total_steps_;
  RwkvModel model_;
  std::string initial_state_;  // content_hash() of init.state; empty: none
  OpenDevice device_;
  std::unique_ptr<Communicator> communicator_;  // null for one process alone
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<StepRunner> runner_;
  TrainerState state_;
  std::unique_ptr<BatchLoader> loader_;
  std::unique_ptr<CheckpointSaver> saver_;  // null in a replay
  int64_t started_step_ = 0;                // updates done before this start
  double started_s_ = 0;                    // steady clock, and state_.elapsed_s, at the start
  double elapsed_before_s_ = 0;
  struct Agreement {
    int stop_signal = 0;
    bool minutes_over = false;
    bool save_due = false;
  };
  Agreement agreed_;    // of several processes
  double saved_s_ = 0;  // steady clock when the last save began
  int64_t saved_step_ = -1;
  double flops_per_token_ = 0;
  double matrix_flops_per_s_ = 0;  // of this machine
};

}  // namespace rwkv
