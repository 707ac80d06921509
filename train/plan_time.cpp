#include "train/plan_time.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#include "model/ops/head_chunks.h"
#include "train/bench/step_model.h"

namespace rwkv {
namespace {

constexpr double kGb = 1e9;
constexpr double kTera = 1e12;

// Rates of an H100: bf16 products of 8192^3 and fp32 ones as `rookery bench step` finds them, its
// copies, and the all-reduce of 1 GB between two GPUs. The others' are the H100's times the ratio
// of their data sheets (989 TFLOP/s bf16 and 67 fp32, 3.35 TB/s and 900 GB/s; A100 312, 19.5, 2.04
// and 600; H200 as the H100 with 4.8 TB/s).
constexpr std::array<GpuRates, 3> kGpus{{
    {.name = "h100",
     .bf16_flops_per_s = 798 * kTera,
     .fp32_flops_per_s = 51.6 * kTera,
     .bytes_per_s = 3000 * kGb,
     .link_bytes_per_s = 332 * kGb,
     .memory_bytes = 80 * kGb,
     .source = "rates measured on one H100, the link between two H200"},
    {.name = "h200",
     .bf16_flops_per_s = 798 * kTera,
     .fp32_flops_per_s = 51.6 * kTera,
     .bytes_per_s = 4300 * kGb,
     .link_bytes_per_s = 332 * kGb,
     .memory_bytes = 141 * kGb,
     .source =
         "the H100's rates, the memory's times the data sheets' ratio: not measured; the link "
         "measured between two H200"},
    {.name = "a100",
     .bf16_flops_per_s = 252 * kTera,
     .fp32_flops_per_s = 15 * kTera,
     .bytes_per_s = 1830 * kGb,
     .link_bytes_per_s = 221 * kGb,
     .memory_bytes = 80 * kGb,
     .source = "the H100's rates times the data sheets' ratios: not measured"},
}};

// Of what an op does in a step, the part that a second forward pass of its block does again.
double forward_share(StepOp op) {
  switch (op) {
    case StepOp::kRkvProducts:
    case StepOp::kOutputProduct:
    case StepOp::kFfnProducts:
      return 1.0 / 3;
    case StepOp::kLayerNormShiftMix:
      return 9.0 / 20;
    case StepOp::kWkv4:
      return 4.0 / 11;
    case StepOp::kReluSquared:
      return 2.0 / 5;
    case StepOp::kGatedResidual:
      return 4.0 / 9;
    default:
      return 0;
  }
}

// The mixes again, of both norms: a sum read, three or two mixes written.
constexpr double kMixesAgain = 7.0 / 20;

// How often it is done, for once without recomputing.
double times_done(StepOp op, Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return 1;
    case Recompute::kMixes:
      return op == StepOp::kLayerNormShiftMix ? 1 + kMixesAgain : 1;
    case Recompute::kBlocks:
      return 1 + forward_share(op);
  }
  return 1;
}

bool is_of_update(StepOp op) {
  return op == StepOp::kGlobalNorm || op == StepOp::kAdamw;
}

}  // namespace

std::span<const GpuRates> all_gpu_rates() {
  return kGpus;
}

const GpuRates& find_gpu_rates(std::string_view name) {
  const auto found = std::ranges::find(kGpus, name, &GpuRates::name);
  if (found == kGpus.end()) {
    std::string names;
    for (const GpuRates& gpu : kGpus) {
      names += (names.empty() ? "" : ", ") + std::string(gpu.name);
    }
    throw std::invalid_argument("--gpu " + std::string(name) +
                                ": its rates are not known; known are " + names);
  }
  return *found;
}

double bus_bytes_per_s(const GpuRates& gpu, int64_t processes) {
  return processes > kGpusPerMachine ? kNetworkBytesPerSecond : gpu.link_bytes_per_s;
}

bool can_plan_time(const ModelConfig& model) {
  return model.version == "rwkv4";
}

TimePlan plan_time(const StepPlan& plan, const GpuRates& gpu) {
  const bool is_half = plan.dtype == TrainDtype::kBf16;
  const StepRates rates{
      .flops_per_s = kEfficiency * (is_half ? gpu.bf16_flops_per_s : gpu.fp32_flops_per_s),
      .bytes_per_s = kEfficiency * gpu.bytes_per_s};
  const double parts = plan.zero_stage >= 1 ? static_cast<double>(plan.processes) : 1;
  double micro_batch_ms = 0;
  double update_ms = 0;
  for (const StepOpCost& cost :
       step_model({.model = plan.model, .batch_size = plan.micro_batch_size},
                  plan.dtype,
                  ops::kCudaMultiple)) {
    const double ms = floor_ms(cost, rates) + 1000 * kCallSeconds * static_cast<double>(cost.calls);
    if (is_of_update(cost.op)) {
      update_ms += ms / parts;
    } else {
      micro_batch_ms += ms * times_done(cost.op, plan.recompute);
    }
  }
  TimePlan time{.compute_ms = static_cast<double>(plan.micro_batches) * micro_batch_ms + update_ms};
  if (plan.processes == 1) {
    return time;
  }
  const auto processes = static_cast<double>(plan.processes);
  // Of `bytes`, to scatter or to gather; an all-reduce does both.
  const auto exchange_ms = [&](double bytes) {
    return 1000 * (processes - 1) / processes * bytes / bus_bytes_per_s(gpu, plan.processes);
  };
  const double scatter_ms = exchange_ms(gradient_bytes(plan));
  const double reduce_ms = plan.zero_stage == 0 ? 2 * scatter_ms : scatter_ms;
  const auto reductions = static_cast<double>(plan.zero_stage == 2 ? plan.micro_batches : 1);
  time.exchange_ms = reductions * std::max(0.0, reduce_ms - micro_batch_ms * 2 / 3);
  if (plan.zero_stage >= 1) {
    const auto all = static_cast<double>(count_parameters(plan.model, plan.freeze).all);
    time.exchange_ms += exchange_ms(all * (is_half ? 2 : 4));
  }
  return time;
}

}  // namespace rwkv
