#include "train/plan_report.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "data/number_text.h"
#include "model/ops/head_chunks.h"
#include "train/metrics.h"

namespace rwkv {
namespace {

using ops::ceil_div;

constexpr double kGb = 1e9;
constexpr Recompute kRecomputes[] = {Recompute::kNone, Recompute::kMixes, Recompute::kBlocks};

// Of a CPU none is planned.
bool has_time(const PlanRequest& request) {
  return request.gpu != nullptr;
}

int64_t sequences_of_a_process(const PlanRequest& request) {
  return ceil_div(request.config.batch_sequences(), request.processes);
}

PlanChoice choose(const PlanRequest& request,
                  int64_t micro_batch_size,
                  Recompute recompute,
                  int64_t zero_stage) {
  const RunConfig& config = request.config;
  PlanChoice choice{
      .plan = {.model = config.model,
               .micro_batch_size = micro_batch_size,
               .micro_batches = ceil_div(sequences_of_a_process(request), micro_batch_size),
               .dtype = config.train.dtype,
               .recompute = recompute,
               .device = request.gpu == nullptr ? PlanDevice::kCpu : PlanDevice::kCuda,
               .processes = request.processes,
               .zero_stage = zero_stage,
               .freeze = config.optimizer.freeze},
      .memory = {}};
  choice.memory = plan_memory(choice.plan);
  if (has_time(request)) {
    choice.time = plan_time(choice.plan, *request.gpu);
    choice.tokens_per_s =
        static_cast<double>(config.tokens_per_step()) / choice.time.step_ms() * 1000;
  }
  return choice;
}

bool fits(const PlanRequest& request, const PlanChoice& choice) {
  return choice.memory.total() <= request.memory_bytes;
}

// Of one process there is nothing to cut.
std::vector<int64_t> stages_of(const PlanRequest& request) {
  return request.processes == 1 ? std::vector<int64_t>{0} : std::vector<int64_t>{0, 1, 2};
}

// That a micro-batch may have, the most first.
std::vector<int64_t> micro_batch_sizes(const PlanRequest& request) {
  const int64_t batch = request.config.batch_sequences();
  const int64_t most = sequences_of_a_process(request);
  std::vector<int64_t> sizes;
  for (int64_t divisor = 1; divisor * divisor <= batch; ++divisor) {
    if (batch % divisor == 0) {
      sizes.push_back(divisor);
      sizes.push_back(batch / divisor);
    }
  }
  std::erase_if(sizes, [&](int64_t size) { return size > most; });
  std::ranges::sort(sizes, std::greater<>());
  return sizes;
}

std::string describe_model(const PlanRequest& request, const PlanChoice& choice) {
  const ModelConfig& model = request.config.model;
  const ParameterCount count = count_parameters(model, choice.plan.freeze);
  return fmt::format("{} L{} D{} V{} T{}, {} parameters{}, {}",
                     model.version,
                     model.n_layer,
                     model.n_embd,
                     model.vocab_size,
                     model.ctx_len,
                     grouped(static_cast<uint64_t>(count.all)),
                     count.trained == count.all
                         ? ""
                         : ", " + grouped(static_cast<uint64_t>(count.trained)) + " trained",
                     choice.plan.dtype == TrainDtype::kBf16 ? "bf16" : "fp32");
}

std::string describe_device(const PlanRequest& request) {
  if (request.gpu == nullptr) {
    return fmt::format("the CPU, {:.1f} GB", request.memory_bytes / kGb);
  }
  return fmt::format(
      "{} {} of {:.1f} GB", request.processes, request.gpu->name, request.memory_bytes / kGb);
}

std::string describe_choice(const PlanRequest& request, const PlanChoice& choice) {
  const StepPlan& plan = choice.plan;
  std::string text = fmt::format("train.micro_batch_size = {}, {} a step{}, train.recompute = {}",
                                 plan.micro_batch_size,
                                 plan.micro_batches,
                                 request.processes > 1 ? " and GPU" : "",
                                 name_of(plan.recompute));
  if (request.processes > 1) {
    text += fmt::format(", distributed.zero = {}", plan.zero_stage);
  }
  return text;
}

std::string describe_time(const PlanRequest& request, const PlanChoice& choice) {
  std::string text = fmt::format("{:.1f} ms a step, {} tokens/s",
                                 choice.time.step_ms(),
                                 grouped(static_cast<uint64_t>(choice.tokens_per_s)));
  if (choice.time.walk_ms > 0) {
    text += fmt::format(", {:.1f} ms of it in the recurrence", choice.time.walk_ms);
  }
  if (request.processes > 1) {
    text += fmt::format(", {:.1f} ms of it waiting for other GPUs", choice.time.exchange_ms);
  }
  return text + "\n";
}

std::string memory_table(const PlanRequest& request, const PlanChoice& choice) {
  std::string text = fmt::format("{:<12} {:>9}\n", request.processes > 1 ? "a GPU" : "", "GB");
  for (size_t i = 0; i < kNumMemoryKinds; ++i) {
    const auto kind = static_cast<MemoryKind>(i);
    text += fmt::format("{:<12} {:>9.3f}\n", rwkv::name_of(kind), choice.memory[kind] / kGb);
  }
  return text +
         fmt::format("{:<12} {:>9.3f}  of {:.1f}: {}; the most is held {}\n",
                     "total",
                     choice.memory.total() / kGb,
                     request.memory_bytes / kGb,
                     fits(request, choice) ? "fits" : "does not fit",
                     choice.memory.peak == MemoryPeak::kLoss ? "in the loss" : "in backward");
}

std::string fitting_table(const PlanRequest& request, const RunPlan& plan) {
  if (plan.fitting.empty()) {
    return "nothing fits, not even a micro-batch of one sequence with blocks recomputed; take more "
           "or larger GPUs, a smaller model, or a smaller model.ctx_len\n";
  }
  const bool has_stages = request.processes > 1;
  std::string text = fmt::format("{:<10} {}{:>11} {:>9}{}\n",
                                 "recompute",
                                 has_stages ? "ZeRO " : "",
                                 "micro-batch",
                                 "GB",
                                 has_time(request) ? "  ms a step    tokens/s" : "");
  for (size_t i = 0; i < plan.fitting.size(); ++i) {
    const PlanChoice& choice = plan.fitting[i];
    text += fmt::format("{:<10} ", name_of(choice.plan.recompute));
    if (has_stages) {
      text += fmt::format("{:>4} ", choice.plan.zero_stage);
    }
    text +=
        fmt::format("{:>11} {:>9.3f}", choice.plan.micro_batch_size, choice.memory.total() / kGb);
    if (has_time(request)) {
      text += fmt::format("  {:>9.1f} {:>11}",
                          choice.time.step_ms(),
                          grouped(static_cast<uint64_t>(choice.tokens_per_s)));
    }
    text += plan.best == i ? "  best\n" : "\n";
  }
  return text;
}

std::string constants(const PlanRequest& request, const PlanChoice& choice) {
  if (!has_time(request)) {
    return "speed is not planned for a CPU; rookery bench step measures it\n";
  }
  const GpuRates& gpu = *request.gpu;
  const bool is_half = request.config.train.dtype == TrainDtype::kBf16;
  std::string text = fmt::format(
      "roofline: {:.0f} TFLOP/s in {} products, {:.0f} GB/s of memory, {:.2f} of either, {:.0f} us "
      "a call ({})\n",
      (is_half ? gpu.bf16_flops_per_s : gpu.fp32_flops_per_s) / 1e12,
      is_half ? "bf16" : "fp32",
      gpu.bytes_per_s / kGb,
      kEfficiency,
      kCallSeconds * 1e6,
      gpu.source);
  if (choice.time.walk_ms > 0) {
    text += fmt::format(
        "recurrence: {:.0f} cycles a token and {:.2f} for each number of a state on one of {} "
        "multiprocessors, {:.2f} GHz (fitted to wkv7 on one H100)\n",
        kWalkCycles,
        kNumberCycles,
        gpu.multiprocessors,
        gpu.cycles_per_s / 1e9);
  }
  if (request.processes > 1) {
    text +=
        fmt::format("          {:.0f} GB/s bus bandwidth between {} GPUs ({})\n",
                    bus_bytes_per_s(gpu, request.processes) / kGb,
                    request.processes,
                    request.processes > kGpusPerMachine
                        ? fmt::format("{} a machine, 400 Gbit/s for each: assumed", kGpusPerMachine)
                        : "all-reduce of 1 GB between two");
  }
  return text + fmt::format(
                    "framework: {:.2f} GB of LibTorch's pool; the CUDA context {:.2f}{}: assumed\n",
                    kPoolBytes / kGb,
                    kCudaContextBytes / kGb,
                    request.processes > 1 ? fmt::format(", NCCL {:.2f}", kNcclBytes / kGb) : "");
}

nlohmann::ordered_json choice_as_json(const PlanRequest& request, const PlanChoice& choice) {
  nlohmann::ordered_json bytes;
  for (size_t i = 0; i < kNumMemoryKinds; ++i) {
    const auto kind = static_cast<MemoryKind>(i);
    bytes[std::string(rwkv::name_of(kind))] = static_cast<int64_t>(choice.memory[kind]);
  }
  nlohmann::ordered_json json = {
      {"micro_batch_size", choice.plan.micro_batch_size},
      {"micro_batches", choice.plan.micro_batches},
      {"recompute", name_of(choice.plan.recompute)},
      {"zero_stage", choice.plan.zero_stage},
      {"fits", fits(request, choice)},
      {"peak", choice.memory.peak == MemoryPeak::kLoss ? "loss" : "backward"},
      {"bytes", bytes},
      {"total_bytes", static_cast<int64_t>(choice.memory.total())}};
  if (has_time(request)) {
    json["compute_ms"] = choice.time.compute_ms;
    json["walk_ms"] = choice.time.walk_ms;
    json["exchange_ms"] = choice.time.exchange_ms;
    json["step_ms"] = choice.time.step_ms();
    json["tokens_per_s"] = choice.tokens_per_s;
  }
  return json;
}

}  // namespace

RunPlan plan_run(const PlanRequest& request) {
  const RunConfig& config = request.config;
  if (config.batch_sequences() < request.processes) {
    throw std::invalid_argument(fmt::format(
        "train.batch_size = {} for --gpus {}: each needs a sequence of every step; use {} or more",
        config.batch_sequences(),
        request.processes,
        request.processes));
  }
  RunPlan plan;
  const int64_t micro_batch =
      std::min(config.micro_batch_sequences(), sequences_of_a_process(request));
  plan.configured = choose(request,
                           micro_batch,
                           config.train.recompute,
                           request.processes == 1 ? 0 : config.distributed.zero);
  plan.fits = fits(request, plan.configured);
  const std::vector<int64_t> sizes = micro_batch_sizes(request);
  for (const Recompute recompute : kRecomputes) {
    for (const int64_t stage : stages_of(request)) {
      for (const int64_t size : sizes) {
        PlanChoice choice = choose(request, size, recompute, stage);
        if (fits(request, choice)) {
          plan.fitting.push_back(std::move(choice));
          break;
        }
      }
    }
  }
  for (size_t i = 0; i < plan.fitting.size(); ++i) {
    if (!plan.best || plan.fitting[i].tokens_per_s > 1.01 * plan.fitting[*plan.best].tokens_per_s) {
      plan.best = i;
    }
  }
  return plan;
}

std::string memory_as_line(const StepPlan& plan) {
  const MemoryPlan memory = plan_memory(plan);
  std::string text = "memory, planned:";
  if (plan.processes > 1) {
    text = fmt::format("memory of each of {} processes, planned for distributed.zero = {}:",
                       plan.processes,
                       plan.zero_stage);
  }
  for (size_t i = 0; i < kNumMemoryKinds; ++i) {
    const auto kind = static_cast<MemoryKind>(i);
    if (memory[kind] == 0) {
      continue;
    }
    const bool is_gradient = kind == MemoryKind::kGradients;
    const bool is_cut = is_gradient ? plan.zero_stage == 2
                                    : plan.zero_stage >= 1 && (kind == MemoryKind::kMasters ||
                                                               kind == MemoryKind::kMoments);
    text += fmt::format(" {} {}", rwkv::name_of(kind), format_bytes(std::llround(memory[kind])));
    if (is_cut) {
      text += fmt::format(" (1 of {} parts{})", plan.processes, is_gradient ? ", and buckets" : "");
    }
    text += ",";
  }
  return text + fmt::format(" {} in all", format_bytes(std::llround(memory.total())));
}

std::string plan_as_text(const PlanRequest& request, const RunPlan& plan) {
  std::string text = describe_model(request, plan.configured) + "\n" + describe_device(request) +
                     ": " + describe_choice(request, plan.configured) + "\n\n" +
                     memory_table(request, plan.configured);
  if (has_time(request)) {
    text += describe_time(request, plan.configured);
  }
  return text + "\nthe largest micro-batch that fits:\n" + fitting_table(request, plan) + "\n" +
         constants(request, plan.configured);
}

std::string plan_as_json(const PlanRequest& request, const RunPlan& plan) {
  const ParameterCount count =
      count_parameters(request.config.model, request.config.optimizer.freeze);
  nlohmann::ordered_json json = {{"parameters", count.all},
                                 {"trained_parameters", count.trained},
                                 {"device", request.gpu == nullptr ? "cpu" : request.gpu->name},
                                 {"processes", request.processes},
                                 {"memory_bytes", static_cast<int64_t>(request.memory_bytes)},
                                 {"configured", choice_as_json(request, plan.configured)},
                                 {"fitting", nlohmann::ordered_json::array()},
                                 {"best", nullptr}};
  for (const PlanChoice& choice : plan.fitting) {
    json["fitting"].push_back(choice_as_json(request, choice));
  }
  if (plan.best) {
    json["best"] = *plan.best;
  }
  if (has_time(request)) {
    const GpuRates& gpu = *request.gpu;
    json["constants"] = {{"bf16_flops_per_s", gpu.bf16_flops_per_s},
                         {"fp32_flops_per_s", gpu.fp32_flops_per_s},
                         {"bytes_per_s", gpu.bytes_per_s},
                         {"bus_bytes_per_s", bus_bytes_per_s(gpu, request.processes)},
                         {"efficiency", kEfficiency},
                         {"call_s", kCallSeconds},
                         {"source", gpu.source}};
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace rwkv
