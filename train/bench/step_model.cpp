#include "train/bench/step_model.h"

#include <algorithm>
#include <stdexcept>

#include "model/version_shapes.h"

namespace rwkv {
namespace {

// A Linear from `in` to `out` features, over all tokens, as often as there are layers or once.
struct Product {
  double in;
  double out;
};

// y = x W^T forward, dx = dy W and dW = dy^T x backward: three products of the same size, which
// read and write each of the three matrices x or dx, y or dy, W or dW once.
StepOpCost products(
    StepOp op, int64_t layers, double tokens, double size, const std::vector<Product>& of_a_layer) {
  StepOpCost cost{.op = op,
                  .calls = 3 * layers * static_cast<int64_t>(of_a_layer.size()),
                  .flops = 0,
                  .bytes = 0};
  for (const auto& [in, out] : of_a_layer) {
    cost.flops += static_cast<double>(layers) * 3 * 2 * tokens * in * out;
    cost.bytes += static_cast<double>(layers) * 3 * size * (tokens * in + tokens * out + in * out);
  }
  return cost;
}

}  // namespace

std::string_view name_of(StepOp op) {
  constexpr std::array<std::string_view, kNumStepOps> kNames{"embedding",
                                                             "layer_norm",
                                                             "layer_norm_shift_mix",
                                                             "r, k, v products",
                                                             "wkv4 with gate",
                                                             "output product",
                                                             "ffn products",
                                                             "relu_squared",
                                                             "gated_residual",
                                                             "head products",
                                                             "cross entropy",
                                                             "gradient sum",
                                                             "global norm",
                                                             "adamw",
                                                             "other ops"};
  return kNames[static_cast<size_t>(op)];
}

std::vector<StepOpCost> step_model(const StepShape& shape,
                                   TrainDtype dtype,
                                   int64_t vocab_multiple) {
  const ModelConfig& model = shape.model;
  if (model.version != "rwkv4") {
    throw std::invalid_argument("step_model: model.version is " + model.version +
                                ", expected rwkv4; its ops are not in the model of a step");
  }
  const int64_t L = model.n_layer;
  const auto layers = static_cast<double>(L);
  const auto C = static_cast<double>(model.n_embd);
  const auto A = static_cast<double>(model.dim_att);
  const auto F = static_cast<double>(model.dim_ffn);
  const auto V = static_cast<double>(model.vocab_size);
  const auto V_padded = static_cast<double>((model.vocab_size + vocab_multiple - 1) /
                                            vocab_multiple * vocab_multiple);
  const auto size = dtype == TrainDtype::kBf16 ? 2.0 : 4.0;
  const auto tokens = static_cast<double>(shape.batch_size * model.ctx_len);
  const double plane = size * tokens * C;  // an activation [B, T, C]
  const TensorShapes shapes = find_version_shapes(model.version).parameters(model);
  double parameters = 0;
  for (const auto& [name, tensor] : shapes) {
    parameters += static_cast<double>(num_elements(tensor));
  }
  constexpr double kFloat = sizeof(float);
  return {
      // A row for each token, read and written, beside its id; backward reads rows and writes the
      // whole table, most of it zeros.
      {.op = StepOp::kEmbedding,
       .calls = 2,
       .flops = 0,
       .bytes = 2 * plane + plane + size * V * C + 2 * sizeof(int64_t) * tokens},
      // Forward x to y; backward x and dy to dx.
      {.op = StepOp::kLayerNorm, .calls = 4, .flops = 0, .bytes = 2 * (2 + 3) * plane},
      // Of ln1: x to three mixes; s, their gradients and that of s to ds. Of ln2: x and delta to s
      // and two mixes; s, two gradients and that of s to ds. Mean and rstd of each token between.
      {.op = StepOp::kLayerNormShiftMix,
       .calls = 4 * L,
       .flops = 0,
       .bytes = layers * ((4 + 6 + 5 + 5) * plane + 2 * 2 * 2 * kFloat * tokens)},
      products(StepOp::kRkvProducts, L, tokens, size, {{C, A}, {C, A}, {C, A}}),
      // r, k, v to y; r, k, v and dy to dr, dk, dv.
      {.op = StepOp::kWkv4,
       .calls = 2 * L,
       .flops = 0,
       .bytes = layers * (4 + 7) * size * tokens * A},
      products(StepOp::kOutputProduct, L, tokens, size, {{A, C}}),
      products(StepOp::kFfnProducts, L, tokens, size, {{C, F}, {C, C}, {F, C}}),
      // In place; backward h and dh, over h.
      {.op = StepOp::kReluSquared,
       .calls = 2 * L,
       .flops = 0,
       .bytes = layers * (2 + 3) * size * tokens * F},
      // x, r, y to the sum; r, y and its gradient to dr and dy.
      {.op = StepOp::kGatedResidual, .calls = 2 * L, .flops = 0, .bytes = layers * (4 + 5) * plane},
      products(StepOp::kHeadProducts, 1, tokens, size, {{C, V_padded}}),
      // The gradient over the logits.
      {.op = StepOp::kCrossEntropy, .calls = 1, .flops = 0, .bytes = 2 * size * tokens * V_padded},
      // From backward's gradient into the flat fp32 one.
      {.op = StepOp::kGradientSum,
       .calls = static_cast<int64_t>(shapes.size()),
       .flops = 0,
       .bytes = parameters * (size + kFloat)},
      {.op = StepOp::kGlobalNorm, .calls = 1, .flops = 0, .bytes = parameters * kFloat},
      // Gradient; master weight and both moments, read and written; the bf16 weight. One pass, in
      // as many calls as there are groups.
      {.op = StepOp::kAdamw,
       .calls = 1,
       .flops = 0,
       .bytes = parameters * ((1 + 2 * 3) * kFloat + (dtype == TrainDtype::kBf16 ? size : 0))},
  };
}

double floor_ms(const StepOpCost& cost, const StepRates& rates) {
  return 1000 * std::max(cost.flops / rates.flops_per_s, cost.bytes / rates.bytes_per_s);
}

}  // namespace rwkv
