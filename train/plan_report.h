// A run planned before it starts: what it takes of each GPU's memory, and what would fit. No Torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/plan.h"
#include "train/plan_time.h"
#include "train/run_config.h"

namespace rwkv {

struct PlanRequest {
  RunConfig config;               // valid, its model's sizes resolved
  const GpuRates* gpu = nullptr;  // null: the CPU
  int64_t processes = 1;          // GPUs; 1 on the CPU
  double memory_bytes = 0;        // of one of them, or of the machine
};

// One way to run it.
struct PlanChoice {
  StepPlan plan;
  MemoryPlan memory;
  // On GPUs: of the whole run's batch.
  TimePlan time = {};
  double tokens_per_s = 0;
};

struct RunPlan {
  PlanChoice configured;
  bool fits = false;
  // For each recompute and each stage of ZeRO the largest micro-batch that fits, if one
  // does: sequences that divide the batch and are no more than a process has of it.
  std::vector<PlanChoice> fitting;
  // Of `fitting`: on GPUs the fastest, where one is as fast within a hundredth the one with less
  // recomputing and the lower stage; on the CPU the one with the least recomputing.
  std::optional<size_t> best;
};

// Throws std::invalid_argument where the batch has fewer sequences than there are processes, and as
// plan_memory().
RunPlan plan_run(const PlanRequest& request);

// What a process will hold, on one line: "memory, planned: weights 652 MB, ..., 3.10 GB in all"; of
// several with their number, the stage of ZeRO and what is a part. Throws as plan_memory().
std::string memory_as_line(const StepPlan& plan);

std::string plan_as_text(const PlanRequest& request, const RunPlan& plan);
std::string plan_as_json(const PlanRequest& request, const RunPlan& plan);

}  // namespace rwkv
