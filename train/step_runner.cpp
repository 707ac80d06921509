#include "train/step_runner.h"

#include <ATen/ATen.h>

#include <spdlog/spdlog.h>

namespace rwkv {

StepNumbers PendingNumbers::wait() {
  if (control_ != nullptr) {
    numbers_ = read_step_numbers(control_->wait());
    control_.reset();
  }
  return numbers_;
}

StepRunner::StepRunner(RwkvModel model,
                       Optimizer& optimizer,
                       ops::DeviceRuntime* runtime,
                       const StepSettings& settings,
                       Communicator* communicator)
    : model_(std::move(model)),
      optimizer_(optimizer),
      runtime_(runtime),
      settings_(settings),
      communicator_(communicator) {
  if (communicator_ != nullptr) {
    data_parallel_ = std::make_unique<DataParallel>(*communicator_, optimizer_);
  }
  const at::TensorOptions options =
      optimizer_.control().options().dtype(at::kFloat).requires_grad(false);
  loss_ = at::zeros({}, options);
  losses_ = at::zeros({settings_.micro_batches}, options);
}

StepRunner::~StepRunner() = default;

void StepRunner::begin_step() {
  micro_batch_ = 0;
  rows_.clear();
}

void StepRunner::add_micro_batch(const at::Tensor& inputs_BT, const at::Tensor& targets_BT) {
  if (runtime_ == nullptr) {
    inputs_BT_ = inputs_BT;
    targets_BT_ = targets_BT;
  } else {
    // One place for all steps: recorded work reads it there.
    if (!inputs_BT_.defined() || inputs_BT_.sizes() != inputs_BT.sizes()) {
      inputs_BT_ = at::empty(inputs_BT.sizes(), loss_.options().dtype(at::kLong));
      targets_BT_ = at::empty_like(inputs_BT_);
    }
    runtime_->upload(inputs_BT, inputs_BT_);
    runtime_->upload(targets_BT, targets_BT_);
  }
  if (initial_state_.layers.empty() || initial_rows_ != inputs_BT.size(0)) {
    initial_rows_ = inputs_BT.size(0);
    initial_state_ = model_->initial_state(initial_rows_);
  }
  rows_.push_back(static_cast<double>(inputs_BT.size(0)));
  const bool is_first = micro_batch_ == 0;
  // It makes a difference to several processes alone.
  const bool is_last = communicator_ != nullptr && micro_batch_ + 1 == settings_.micro_batches;
  run(is_first && is_last ? Position::kOnly
      : is_first          ? Position::kFirst
      : is_last           ? Position::kLast
                          : Position::kLater);
  losses_.select(0, micro_batch_).copy_(loss_);
  ++micro_batch_;
}

PendingNumbers StepRunner::finish_step(double lr) {
  optimizer_.set_lr(lr);
  run(Position::kUpdate);
  ++steps_;
  return runtime_ == nullptr ? PendingNumbers(optimizer_.numbers())
                             : PendingNumbers(runtime_->download(optimizer_.control()));
}

at::Tensor StepRunner::losses() const {
  return losses_.cpu();
}

void StepRunner::run(Position position) {
  std::unique_ptr<ops::RecordedWork>& recorded = recorded_[static_cast<size_t>(position)];
  // The first step finds out what libraries need: workspaces, kernels to load, memory.
  const bool can_record = runtime_ != nullptr && settings_.record && steps_ > 0;
  if (can_record && recorded == nullptr) {
    try {
      if (position == Position::kFirst || position == Position::kOnly) {
        // What the first step has left would lie beside what is recorded.
        runtime_->reset_memory();
      }
      recorded = runtime_->record([&] { run_eagerly(position); });
    } catch (const c10::Error& error) {
      spdlog::warn("the step cannot be recorded as a graph and runs op by op: {}",
                   error.what_without_backtrace());
      settings_.record = false;
    }
  }
  if (recorded != nullptr && settings_.record) {
    recorded->replay();
  } else {
    run_eagerly(position);
  }
}

void StepRunner::run_eagerly(Position position) {
  if (position == Position::kUpdate) {
    if (data_parallel_ == nullptr) {
      optimizer_.update(losses_.mean());
      return;
    }
    for (int64_t i = settings_.micro_batches; i < settings_.most_micro_batches; ++i) {
      data_parallel_->add_empty_pass(i + 1 == settings_.most_micro_batches);
    }
    data_parallel_->update(share_of_loss());
    return;
  }
  if (position == Position::kFirst || position == Position::kOnly) {
    optimizer_.zero_gradient();
  }
  forward_and_backward(position == Position::kLast || position == Position::kOnly);
}

at::Tensor StepRunner::share_of_loss() {
  at::Tensor loss = at::zeros({}, losses_.options());
  for (size_t i = 0; i < rows_.size(); ++i) {
    loss += losses_.select(0, static_cast<int64_t>(i)) *
            (rows_[i] / static_cast<double>(settings_.step_rows));
  }
  return loss;
}

void StepRunner::forward_and_backward(bool is_last) {
  const at::Tensor loss =
      model_->loss(inputs_BT_, targets_BT_, initial_state_, settings_.l2wrap).loss;
  if (data_parallel_ != nullptr) {
    data_parallel_->begin_pass(is_last);
  }
  const double micro_batches = settings_.step_rows == 0
                                   ? static_cast<double>(settings_.micro_batches)
                                   : static_cast<double>(settings_.step_rows) / rows_.back();
  (loss / micro_batches).backward();
  optimizer_.accumulate_gradient();
  if (data_parallel_ != nullptr) {
    data_parallel_->finish_pass();
  }
  const at::NoGradGuard no_grad;
  loss_.copy_(loss);
}

}  // namespace rwkv
