// The work of one training step on its device: micro-batches forward and backward, then the update.
//
// On the CPU each call does its work. On another device it only puts work into a queue, and where
// the device can record, the second step is recorded and later ones are replayed: no allocation,
// and one call of the host for each micro-batch.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/ops/device_runtime.h"
#include "model/rwkv_model.h"
#include "train/distributed/communicator.h"
#include "train/distributed/data_parallel.h"
#include "train/optimizer.h"

namespace rwkv {

struct StepSettings {
  int64_t micro_batches = 1;
  // Of the process that has the most; 0: as many.
  int64_t most_micro_batches = 0;
  // Sequences of a step, those of other processes included; 0: the micro-batches' own, all of one
  // size.
  int64_t step_rows = 0;
  double l2wrap = 0;
  bool record = true;  // where the device can
};

// The numbers of a step that the device may still be at.
class PendingNumbers {
 public:
  PendingNumbers() = default;
  explicit PendingNumbers(StepNumbers numbers) : numbers_(numbers) {}
  explicit PendingNumbers(std::unique_ptr<ops::HostCopy> control) : control_(std::move(control)) {}
  // Waits for the device, the first time.
  StepNumbers wait();

 private:
  std::unique_ptr<ops::HostCopy> control_;
  StepNumbers numbers_;
};

class StepRunner {
 public:
  // `runtime` is null on the CPU. Model and optimizer are on the device already; all three outlive
  // the runner, and so does the communicator, if several processes make the steps together.
  StepRunner(RwkvModel model,
             Optimizer& optimizer,
             ops::DeviceRuntime* runtime,
             const StepSettings& settings,
             Communicator* communicator = nullptr);
  ~StepRunner();

  void begin_step();
  // Forward and backward of the next micro-batch of the step; [rows, T], int64, on the CPU. Its
  // memory may be used again at once. All have one shape but for a step's last, which may have
  // fewer rows.
  void add_micro_batch(const at::Tensor& inputs_BT, const at::Tensor& targets_BT);
  // The update, after the last micro-batch. The next step may begin before its numbers are there.
  PendingNumbers finish_step(double lr);

  // Mean loss of each micro-batch of the step so far, [micro_batches], fp32, on the CPU; waits.
  at::Tensor losses() const;

 private:
  // A micro-batch that is its step's first, its last, both or neither; or the update.
  enum class Position { kOnly, kFirst, kLater, kLast, kUpdate };
  static constexpr size_t kNumPositions = 5;

  void run(Position position);
  void run_eagerly(Position position);
  void forward_and_backward(bool is_last);
  at::Tensor share_of_loss();

  RwkvModel model_;
  Optimizer& optimizer_;
  ops::DeviceRuntime* runtime_;
  StepSettings settings_;
  Communicator* communicator_;
  std::unique_ptr<DataParallel> data_parallel_;  // of several processes
  int64_t steps_ = 0;
  int64_t micro_batch_ = 0;  // of the step
  at::Tensor inputs_BT_;
  at::Tensor targets_BT_;
  State initial_state_;
  int64_t initial_rows_ = 0;
  at::Tensor loss_;           // of the micro-batch, a scalar
  at::Tensor losses_;         // of the step's micro-batches
  std::vector<double> rows_;  // of them
  std::unique_ptr<ops::RecordedWork> recorded_[kNumPositions];
};

}  // namespace rwkv
