// Where the time of a training step goes, from its shape alone: what each kind of op computes and
// moves, forward and backward, and the time that this takes at the rates of a machine. No Torch
// here: a step is planned (train/plan_time.h) where there is none.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "model/model_config.h"
#include "train/run_config.h"

namespace rwkv {

struct StepShape {
  ModelConfig model;       // ctx_len is T
  int64_t batch_size = 8;  // B
};

// In the order in which a step comes to them.
enum class StepOp {
  kEmbedding,
  kLayerNorm,  // ln0 and ln_out
  kLayerNormShiftMix,
  kRkvProducts,
  kWkv4,
  kOutputProduct,
  kFfnProducts,
  kReluSquared,
  kGatedResidual,
  kHeadProducts,
  kCrossEntropy,
  kGradientSum,
  kGlobalNorm,
  kAdamw,
  kOther,  // what the model knows nothing of
};
constexpr size_t kNumStepOps = static_cast<size_t>(StepOp::kOther) + 1;
std::string_view name_of(StepOp op);

// All of one kind in a step.
struct StepOpCost {
  StepOp op;
  int64_t calls;  // forward and backward apart; of a product backward is two
  double flops;   // of matrix products; all other arithmetic takes less time than its bytes
  // Of tensors, read and written, each way counted once a call. What stays in a cache from one op
  // to the next is counted all the same.
  double bytes;
};

// A row for each kind but kOther, of a step of one micro-batch with its logits in one chunk.
// `shape.model` is resolved: RwkvModel's config(). `dtype` is that of weights and activations;
// master weights, moments and the summed gradient are fp32. The head is padded to a multiple of
// `vocab_multiple` (model/ops/head_loss.h). Throws std::invalid_argument for another version than
// rwkv4.
std::vector<StepOpCost> step_model(const StepShape& shape,
                                   TrainDtype dtype,
                                   int64_t vocab_multiple);

// Of a machine, measured (train/machine_rates.h).
struct StepRates {
  double flops_per_s = 0;
  double bytes_per_s = 0;
};
// Arithmetic and bytes overlap, so the longer of the two.
double floor_ms(const StepOpCost& cost, const StepRates& rates);

}  // namespace rwkv
