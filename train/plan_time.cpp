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
// and 600; H200 as the H100 with 4.8 TB/s). Clocks: 1.75 GHz as under RWKV-7's steps,
// the A100's by its data sheet.
constexpr std::array<GpuRates, 3> kGpus{{
    {.name = "h100",
     .bf16_flops_per_s = 798 * kTera,
     .fp32_flops_per_s = 51.6 * kTera,
     .bytes_per_s = 3000 * kGb,
     .link_bytes_per_s = 332 * kGb,
     .memory_bytes = 80 * kGb,
     .multiprocessors = 132,
     .cycles_per_s = 1.75e9,
     .source = "rates measured on one H100, the link between two H200"},
    {.name = "h200",
     .bf16_flops_per_s = 798 * kTera,
     .fp32_flops_per_s = 51.6 * kTera,
     .bytes_per_s = 4300 * kGb,
     .link_bytes_per_s = 332 * kGb,
     .memory_bytes = 141 * kGb,
     .multiprocessors = 132,
     .cycles_per_s = 1.75e9,
     .source =
         "the H100's rates, the memory's times the data sheets' ratio: not measured; the link "
         "measured between two H200"},
    {.name = "a100",
     .bf16_flops_per_s = 252 * kTera,
     .fp32_flops_per_s = 15 * kTera,
     .bytes_per_s = 1830 * kGb,
     .link_bytes_per_s = 221 * kGb,
     .memory_bytes = 80 * kGb,
     .multiprocessors = 108,
     .cycles_per_s = 1.41e9,
     .source = "the H100's rates times the data sheets' ratios: not measured"},
}};

// How often it is done, for once without recomputing.
double times_done(const StepOpCost& cost, Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return 1;
    case Recompute::kMixes:
      return 1 + cost.mixes_again;
    case Recompute::kBlocks:
      return 1 + cost.blocks_again;
  }
  return 1;
}

double walk_ms(const StepOpCost& cost, const GpuRates& gpu) {
  const double numbers = cost.walked_numbers / static_cast<double>(gpu.multiprocessors);
  return 1000 * cost.walked_tokens * (kWalkCycles + kNumberCycles * numbers) / gpu.cycles_per_s;
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

TimePlan plan_time(const StepPlan& plan, const GpuRates& gpu) {
  const bool is_half = plan.dtype == TrainDtype::kBf16;
  const StepRates rates{
      .flops_per_s = kEfficiency * (is_half ? gpu.bf16_flops_per_s : gpu.fp32_flops_per_s),
      .bytes_per_s = kEfficiency * gpu.bytes_per_s};
  const double parts = plan.zero_stage >= 1 ? static_cast<double>(plan.processes) : 1;
  double micro_batch_ms = 0;
  double update_ms = 0;
  double walked_ms = 0;  // of a micro-batch
  for (const StepOpCost& cost :
       step_model({.model = plan.model, .batch_size = plan.micro_batch_size},
                  plan.dtype,
                  ops::kCudaMultiple)) {
    const double walk = walk_ms(cost, gpu);
    const double ms = std::max(floor_ms(cost, rates), walk) +
                      1000 * kCallSeconds * static_cast<double>(cost.calls);
    if (is_of_update(cost.op)) {
      update_ms += ms / parts;
    } else {
      micro_batch_ms += ms * times_done(cost, plan.recompute);
      walked_ms += walk * times_done(cost, plan.recompute);
    }
  }
  const auto micro_batches = static_cast<double>(plan.micro_batches);
  TimePlan time{.compute_ms = micro_batches * micro_batch_ms + update_ms,
                .walk_ms = micro_batches * walked_ms};
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
