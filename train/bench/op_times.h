// The time that a training step spends in each kind of op, on any device.
#pragma once

#include <array>
#include <functional>

#include <c10/core/Device.h>

#include "model/rwkv_model.h"
#include "train/bench/step_model.h"

namespace rwkv {

struct StepOpTimes {
  double total_ms = 0;  // of the step, what lies between its ops included
  std::array<double, kNumStepOps> ms{};

  double operator[](StepOp op) const { return ms[static_cast<size_t>(op)]; }
};

// Calls `step`, a training step of `model`, and sums the time of its ops by kind. An op called by
// another counts as its own kind or, without one, as its caller's; backward's as that of the
// forward op whose gradient it computes. On the CPU the clock is the host's; on another device its
// events on the current stream, so that a gap the host leaves between two kernels counts for the op
// that waits for it. One call at a time. Throws c10::Error if the device has no such events.
StepOpTimes time_ops_of_step(RwkvModel model, at::Device device, const std::function<void()>& step);

}  // namespace rwkv
