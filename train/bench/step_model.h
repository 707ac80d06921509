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
  kLowRankProducts,  // down and up again, with what lies between
  kWkv4,
  kWkv7Inputs,
  kWkv7,
  kWkv7Output,
  kOutputProduct,
  kFfnProducts,
  kReluSquared,
  kGatedResidual,
  kSums,  // of a residual, and of gradients of a tensor that two ops read
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
  // Of matrix products and of recurrences with a matrix for each head, where they are fp32 in any
  // dtype; all other arithmetic takes less time than its bytes.
  double flops;
  // Of tensors, read and written, each way counted once a call. What stays in a cache from one op
  // to the next is counted all the same.
  double bytes;
  // Of all that, the shares that Recompute::kMixes and kBlocks do once more in backward.
  double mixes_again = 0;
  double blocks_again = 0;
  // Of a recurrence whose GPU kernels walk the tokens: how many come one after another, of all
  // layers, and how many numbers of states are walked side by side. 0 of all others.
  double walked_tokens = 0;
  double walked_numbers = 0;
};

// Whether a version's ops are in the model of a step.
bool has_step_model(const ModelConfig& model);

// A row for each kind that the version has, but kOther, in their order, of a step of one
// micro-batch with its logits in one chunk. `shape.model` is resolved: RwkvModel's config().
// `dtype` is that of weights and activations; master weights, moments and the summed gradient are
// fp32. The head is padded to a multiple of `vocab_multiple` (model/ops/head_loss.h). Throws
// std::invalid_argument for a version without a model.
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
