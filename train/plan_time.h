// How long a training step will take on GPUs, from the configuration alone: a roofline over the
// model of a step (train/bench/step_model.h), whose constants can be printed. No Torch here.
//
//   compute   sum over kinds of op of max(flops / matrix rate, bytes / memory rate) / kEfficiency,
//             and kCallSeconds for each call; a recurrence whose kernels walk the tokens (RWKV-7's)
//             takes as long as the walk
//   exchange  what is left of the gradients' reduction when backward, two thirds of a micro-batch,
//             has hidden it; with ZeRO the gathering of the updated weights, which nothing hides
//
// Measured on one H100 beside it: tests/train/test_plan.cpp. No step on several GPUs has been.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "train/plan.h"

namespace rwkv {

// What one GPU reaches, not what its data sheet says.
struct GpuRates {
  std::string_view name;  // as --gpu takes it
  double bf16_flops_per_s;
  double fp32_flops_per_s;
  double bytes_per_s;
  // Bus bandwidth of an all-reduce inside a machine.
  double link_bytes_per_s;
  double memory_bytes;  // as it is sold
  int64_t multiprocessors;
  double cycles_per_s;      // of their clock, under load
  std::string_view source;  // where the rates come from
};
std::span<const GpuRates> all_gpu_rates();
// Throws std::invalid_argument listing the names.
const GpuRates& find_gpu_rates(std::string_view name);

// From more than that many on they are in several machines, and a slower network joins them: bus
// bandwidth of 400 Gbit/s for each GPU. Not measured here.
inline constexpr int64_t kGpusPerMachine = 8;
inline constexpr double kNetworkBytesPerSecond = 50e9;
// Of either rate, in kernels of a step, and the time that a kernel takes to start and to drain.
// Fitted to the steps of tests/bench/results/gpu_h100_2026-11.md, which they give to 10 %.
inline constexpr double kEfficiency = 0.9;
inline constexpr double kCallSeconds = 3e-6;

// Of wkv7, forward and backward: a walk's cycles for each token, and more for each number of the
// states that a multiprocessor walks. Fitted to the four rows of wkv7
// in tests/bench/results/gpu_h100_2026-11.md, which they give to 3 %.
inline constexpr double kWalkCycles = 1950;
inline constexpr double kNumberCycles = 0.27;

// Bus bandwidth between so many.
double bus_bytes_per_s(const GpuRates& gpu, int64_t processes);

struct TimePlan {
  double compute_ms = 0;   // forward, backward and update
  double walk_ms = 0;      // of it, a recurrence walking the tokens
  double exchange_ms = 0;  // waiting for other processes
  double step_ms() const { return compute_ms + exchange_ms; }
};

// `plan` is of PlanDevice::kCuda. With stage 2 each micro-batch's gradients are reduced, into the
// shards; otherwise the sum of all is, once. Throws as plan_memory() and step_model().
TimePlan plan_time(const StepPlan& plan, const GpuRates& gpu);

}  // namespace rwkv
