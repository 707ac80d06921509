#include "train/bench/step_model.h"

#include <algorithm>
#include <stdexcept>

#include "model/version_shapes.h"

namespace rwkv {
namespace {

constexpr double kFloat = sizeof(float);

// What the rows of a block are made of.
struct Sizes {
  const ModelConfig& model;
  int64_t L;
  double layers;
  double B, tokens, C, A, F, N;
  double element;  // bytes
  double plane;    // of an activation [B, T, C]

  Sizes(const StepShape& shape, TrainDtype dtype)
      : model(shape.model),
        L(model.n_layer),
        layers(static_cast<double>(L)),
        B(static_cast<double>(shape.batch_size)),
        tokens(static_cast<double>(shape.batch_size * model.ctx_len)),
        C(static_cast<double>(model.n_embd)),
        A(static_cast<double>(model.dim_att)),
        F(static_cast<double>(model.dim_ffn)),
        N(static_cast<double>(model.head_size)),
        element(dtype == TrainDtype::kBf16 ? 2 : kFloat),
        plane(element * tokens * C) {}
};

// A Linear from `in` to `out` features, over all tokens, as often as there are layers or once.
struct Product {
  double in;
  double out;
};

// y = x W^T forward, dx = dy W and dW = dy^T x backward: three products of the same size, which
// read and write each of the three matrices x or dx, y or dy, W or dW once.
StepOpCost products(StepOp op,
                    int64_t layers,
                    const Sizes& sizes,
                    const std::vector<Product>& of_a_layer) {
  StepOpCost cost{.op = op,
                  .calls = 3 * layers * static_cast<int64_t>(of_a_layer.size()),
                  .flops = 0,
                  .bytes = 0,
                  .blocks_again = 1.0 / 3};
  for (const auto& [in, out] : of_a_layer) {
    cost.flops += static_cast<double>(layers) * 3 * 2 * sizes.tokens * in * out;
    cost.bytes += static_cast<double>(layers) * 3 * sizes.element *
                  (sizes.tokens * in + sizes.tokens * out + in * out);
  }
  return cost;
}

// An op of each layer, forward and backward, that reads and writes so many tensors like one of
// `plane` bytes.
StepOpCost moved(StepOp op, const Sizes& sizes, double plane, double forward, double backward) {
  return {.op = op,
          .calls = 2 * sizes.L,
          .flops = 0,
          .bytes = sizes.layers * (forward + backward) * plane,
          .blocks_again = forward / (forward + backward)};
}

// Of ln1: x to the mixes; s, their gradients and that of s to ds. Of ln2: x and delta to s and the
// mixes; s, their gradients and that of s to ds. Mean and rstd of each token between.
StepOpCost norms_with_mixes(const Sizes& sizes, double time_mixes, double channel_mixes) {
  const double mixes = time_mixes + channel_mixes;
  StepOpCost cost =
      moved(StepOp::kLayerNormShiftMix, sizes, sizes.plane, 1 + 3 + mixes, 3 + 3 + mixes);
  cost.calls = 4 * sizes.L;
  cost.bytes += sizes.layers * 2 * 2 * 2 * kFloat * sizes.tokens;
  // The mixes alone: of either norm a sum is read.
  cost.mixes_again = (1 + 1 + mixes) / (4 + 6 + 2 * mixes);
  return cost;
}

// In place; backward h and dh, over h.
StepOpCost relu_squared(const Sizes& sizes) {
  return moved(StepOp::kReluSquared, sizes, sizes.element * sizes.tokens * sizes.F, 2, 3);
}

// ---- Blocks of the versions ---------------------------------------------------------------------

std::vector<StepOpCost> rwkv4_block(const Sizes& sizes) {
  const auto [C, A, F] = std::array{sizes.C, sizes.A, sizes.F};
  return {norms_with_mixes(sizes, 3, 2),
          products(StepOp::kRkvProducts, sizes.L, sizes, {{C, A}, {C, A}, {C, A}}),
          // r, k, v to y; r, k, v and dy to dr, dk, dv.
          moved(StepOp::kWkv4, sizes, sizes.element * sizes.tokens * A, 4, 7),
          products(StepOp::kOutputProduct, sizes.L, sizes, {{A, C}}),
          products(StepOp::kFfnProducts, sizes.L, sizes, {{C, F}, {C, C}, {F, C}}),
          relu_squared(sizes),
          // x, r, y to the sum; r, y and its gradient to dr and dy.
          moved(StepOp::kGatedResidual, sizes, sizes.plane, 4, 5)};
}

// Of w, a, v and g; the first layer has no v.
StepOpCost rwkv7_low_ranks(const Sizes& sizes) {
  const ModelConfig& model = sizes.model;
  const auto pair = [&](int64_t rank) {
    const auto D = static_cast<double>(rank);
    return std::vector<Product>{{sizes.C, D}, {D, sizes.C}};
  };
  StepOpCost sum{.op = StepOp::kLowRankProducts, .calls = 0, .flops = 0, .bytes = 0};
  const auto add = [&](int64_t layers, int64_t rank) {
    const StepOpCost cost = products(sum.op, layers, sizes, pair(rank));
    sum.calls += cost.calls;
    sum.flops += cost.flops;
    sum.bytes += cost.bytes;
    sum.blocks_again = cost.blocks_again;
  };
  add(sizes.L, model.rank_decay);
  add(sizes.L, model.rank_iclr);
  add(sizes.L - 1, model.rank_value);
  add(sizes.L, model.rank_gate);
  // tanh of w and sigmoid of g in place; backward what they left and its gradient, to another.
  const auto inner = static_cast<double>(model.rank_decay + model.rank_gate);
  sum.calls += 2 * 2 * sizes.L;
  sum.bytes += sizes.layers * (2 + 3) * sizes.element * sizes.tokens * inner;
  // The gradients of a0 and v0 are sums over all tokens.
  sum.calls += 2 * sizes.L - 1;
  sum.bytes += (2 * sizes.layers - 1) * sizes.plane;
  return sum;
}

// r, w, k, v, a, b to y; these and dy to six gradients. Between lie u and states, of which the CPU
// keeps one for every 64 tokens (model/ops/wkv7.h), in fp32. The arithmetic is that of its
// equations, with the states gone back through: multiply-adds for each number of the state and
// token 5 forward, 13 backward.
StepOpCost wkv7(const Sizes& sizes) {
  const double numbers = sizes.tokens * sizes.C * sizes.N;
  const double kept = kFloat * sizes.tokens * sizes.C * (1 + sizes.N / 64);
  return {.op = StepOp::kWkv7,
          .calls = 3 * sizes.L,
          .flops = sizes.layers * 2 * (5 + 13) * numbers,
          .bytes = sizes.layers * ((7 + 13) * sizes.plane + 2 * kept),
          .blocks_again = 5.0 / 18,
          .walked_tokens = sizes.layers * sizes.tokens / sizes.B,
          .walked_numbers = sizes.B * sizes.C * sizes.N};
}

std::vector<StepOpCost> rwkv7_block(const Sizes& sizes) {
  const auto [C, F] = std::array{sizes.C, sizes.F};
  // k, a, v, the share of the first layer's v and this, to k, v, a, b; the first five and four
  // gradients to five. The first layer leaves its v alone: k, a to k, a, b; k, a and three
  // gradients to two.
  StepOpCost inputs = moved(StepOp::kWkv7Inputs, sizes, sizes.plane, 5 + 4, 5 + 4 + 5);
  inputs.bytes -= ((9 + 14) - (5 + 7)) * sizes.plane;
  // x and what ChannelMix gives; gradients of r, k and v, and of the first layer's v all but one.
  StepOpCost sums = moved(StepOp::kSums, sizes, sizes.plane, 3, 3 * 3 + 3);
  sums.calls = (1 + 3 + 1) * sizes.L - 1;
  sums.bytes -= 3 * sizes.plane;
  return {norms_with_mixes(sizes, 6, 1),
          products(StepOp::kRkvProducts, sizes.L, sizes, {{C, C}, {C, C}, {C, C}}),
          rwkv7_low_ranks(sizes),
          inputs,
          wkv7(sizes),
          // y, r, k, v, g to one; these and its gradient to five.
          moved(StepOp::kWkv7Output, sizes, sizes.plane, 6, 6 + 5),
          products(StepOp::kOutputProduct, sizes.L, sizes, {{C, C}}),
          products(StepOp::kFfnProducts, sizes.L, sizes, {{C, F}, {F, C}}),
          relu_squared(sizes),
          sums};
}

struct VersionStep {
  std::string_view version;
  std::vector<StepOpCost> (*block)(const Sizes& sizes);
};
constexpr std::array<VersionStep, 2> kVersions{{{"rwkv4", &rwkv4_block}, {"rwkv7", &rwkv7_block}}};

const VersionStep* find_step(std::string_view version) {
  const auto found = std::ranges::find(kVersions, version, &VersionStep::version);
  return found == kVersions.end() ? nullptr : &*found;
}

}  // namespace

std::string_view name_of(StepOp op) {
  constexpr std::array<std::string_view, kNumStepOps> kNames{"embedding",
                                                             "layer_norm",
                                                             "layer_norm_shift_mix",
                                                             "r, k, v products",
                                                             "low-rank products",
                                                             "wkv4 with gate",
                                                             "wkv7_inputs",
                                                             "wkv7",
                                                             "wkv7_output",
                                                             "output product",
                                                             "ffn products",
                                                             "relu_squared",
                                                             "gated_residual",
                                                             "sums",
                                                             "head products",
                                                             "cross entropy",
                                                             "gradient sum",
                                                             "global norm",
                                                             "adamw",
                                                             "other ops"};
  return kNames[static_cast<size_t>(op)];
}

bool has_step_model(const ModelConfig& model) {
  return find_step(model.version) != nullptr;
}

std::vector<StepOpCost> step_model(const StepShape& shape,
                                   TrainDtype dtype,
                                   int64_t vocab_multiple) {
  const ModelConfig& model = shape.model;
  const VersionStep* const version = find_step(model.version);
  if (version == nullptr) {
    throw std::invalid_argument("step_model: model.version is " + model.version +
                                ", whose ops are not in the model of a step");
  }
  const Sizes sizes(shape, dtype);
  const auto [C, tokens, size, plane] =
      std::array{sizes.C, sizes.tokens, sizes.element, sizes.plane};
  const auto V = static_cast<double>(model.vocab_size);
  const auto V_padded = static_cast<double>((model.vocab_size + vocab_multiple - 1) /
                                            vocab_multiple * vocab_multiple);
  const TensorShapes shapes = find_version_shapes(model.version).parameters(model);
  double parameters = 0;
  for (const auto& [name, tensor] : shapes) {
    parameters += static_cast<double>(num_elements(tensor));
  }
  std::vector<StepOpCost> costs{
      // A row for each token, read and written, beside its id; backward reads rows and writes the
      // whole table, most of it zeros.
      {.op = StepOp::kEmbedding,
       .calls = 2,
       .flops = 0,
       .bytes = 2 * plane + plane + size * V * C + 2 * sizeof(int64_t) * tokens},
      // Forward x to y; backward x and dy to dx.
      {.op = StepOp::kLayerNorm, .calls = 4, .flops = 0, .bytes = 2 * (2 + 3) * plane}};
  const std::vector<StepOpCost> block = version->block(sizes);
  costs.insert(costs.end(), block.begin(), block.end());
  StepOpCost head = products(StepOp::kHeadProducts, 1, sizes, {{C, V_padded}});
  head.blocks_again = 0;
  const StepOpCost rest[] = {
      head,
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
       .bytes = parameters * ((1 + 2 * 3) * kFloat + (dtype == TrainDtype::kBf16 ? size : 0))}};
  costs.insert(costs.end(), std::begin(rest), std::end(rest));
  return costs;
}

double floor_ms(const StepOpCost& cost, const StepRates& rates) {
  return 1000 * std::max(cost.flops / rates.flops_per_s, cost.bytes / rates.bytes_per_s);
}

}  // namespace rwkv
