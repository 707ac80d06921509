#include "train/bench/bench_ops.h"

#include <algorithm>
#include <functional>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/autograd.h>

#include "model/ops/adamw.h"
#include "model/ops/cross_entropy.h"
#include "model/ops/embedding.h"
#include "model/ops/few_rows_linear.h"
#include "model/ops/gated_residual.h"
#include "model/ops/layer_norm_shift_mix.h"
#include "model/ops/relu_squared.h"
#include "model/ops/wkv4.h"
#include "model/rwkv_model.h"
#include "train/machine_rates.h"

namespace rwkv {
namespace {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

// An op beside the same maths in plain ops.
struct OpCase {
  std::string name;
  Tensors inputs;
  Function ours;
  Function plain;
  // That the passes read and write, each way counted; and of them the operands, once: results, and
  // what lies between forward and backward, may stay in a cache.
  double moved_bytes;
  double operand_bytes;
  bool reads_alone = false;
};

// A machine's rates, in bytes a second.
struct Rates {
  double update = 0;
  double copy = 0;
  double read = 0;

  // The best of all calls counts: another program's burst could make a floor too high.
  void measure() {
    update = std::max(update, update_bytes_per_s());
    copy = std::max(copy, copy_bytes_per_s());
    read = std::max(read, read_bytes_per_s());
  }
};

// Operands come from memory, as in a training step, where other tensors pass between two calls of
// an op, and not from the cache, which knows no floor of memory.
class CacheSweeper {
 public:
  static constexpr int64_t kBytes = int64_t{1} << 28;  // beyond the last-level cache
  void sweep() { buffer_.add_(1); }

 private:
  at::Tensor buffer_ = at::zeros({kBytes / int64_t{sizeof(float)}});
};

// Forward, then backward from gradients of the outputs that need one. They are ones, and are made
// once: `gradients` comes empty.
void run(const Function& function, const Tensors& inputs, Tensors& gradients) {
  Tensors outputs;
  for (const at::Tensor& output : function(inputs)) {
    if (output.requires_grad()) {
      outputs.push_back(output);
    }
  }
  for (size_t i = gradients.size(); i < outputs.size(); ++i) {
    gradients.push_back(at::ones_like(outputs[i]));
  }
  if (!outputs.empty()) {
    torch::autograd::backward(outputs, gradients);
  }
  for (const at::Tensor& input : inputs) {
    input.mutable_grad().reset();
  }
}

struct OpTimes {
  Spread ours;
  Spread plain;
};

OpTimes time_case(const OpCase& op, CacheSweeper& sweeper, int64_t repeats) {
  std::vector<double> ours_ms, plain_ms;
  Tensors gradients_of_ours, gradients_of_plain;
  run(op.ours, op.inputs, gradients_of_ours);
  run(op.plain, op.inputs, gradients_of_plain);
  for (int64_t i = 0; i < repeats; ++i) {
    sweeper.sweep();
    ours_ms.push_back(milliseconds_of([&] { run(op.ours, op.inputs, gradients_of_ours); }));
    sweeper.sweep();
    plain_ms.push_back(milliseconds_of([&] { run(op.plain, op.inputs, gradients_of_plain); }));
  }
  return {spread_of(ours_ms), spread_of(plain_ms)};
}

at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.set_requires_grad(true);
}

Tensors plain_shift_mix(const Tensors& in) {
  const at::Tensor sum = in[0] + in[1];
  const at::Tensor n = at::layer_norm(sum, in[2].sizes(), in[2], in[3]);
  const at::Tensor previous = at::cat({in[4].unsqueeze(1), n.slice(1, 0, n.size(1) - 1)}, 1);
  Tensors outputs{sum};
  for (int64_t j = 0; j < in[5].size(0); ++j) {
    outputs.push_back(n * in[5][j] + previous * (1 - in[5][j]));
  }
  return outputs;
}

// Token by token, with the running maximum that keeps exponentials small.
Tensors plain_wkv4(const Tensors& in) {
  at::Tensor a = in[4].select(1, 0), b = in[4].select(1, 1), p = in[4].select(1, 2);
  Tensors outputs;
  for (int64_t t = 0; t < in[1].size(1); ++t) {
    const at::Tensor k = in[1].select(1, t), v = in[2].select(1, t);
    const at::Tensor q = at::max(p, in[3] + k);
    const at::Tensor before = (p - q).exp(), now = (in[3] + k - q).exp();
    outputs.push_back(in[5].select(1, t).sigmoid() * (before * a + now * v) / (before * b + now));
    const at::Tensor next = at::max(p + in[0], k);
    const at::Tensor kept = (p + in[0] - next).exp(), added = (k - next).exp();
    a = kept * a + added * v;
    b = kept * b + added;
    p = next;
  }
  return {at::stack(outputs, 1)};
}

Tensors plain_adamw(const Tensors& in) {
  const at::NoGradGuard no_grad;
  at::Tensor p = in[0], m = in[1], v = in[2];
  m.mul_(0.9).add_(in[3], 0.1);
  v.mul_(0.99).addcmul_(in[3], in[3], 0.01);
  p.mul_(1 - 1e-5).addcdiv_(m, v.sqrt().add_(1e-8), -1e-4);
  return {};
}

std::vector<OpCase> training_cases(const StepShape& shape, at::ScalarType dtype) {
  const int64_t B = shape.batch_size, T = shape.model.ctx_len, C = shape.model.n_embd;
  const int64_t V = shape.model.vocab_size;
  const auto normal = [&](at::IntArrayRef sizes) { return leaf(at::randn(sizes, dtype)); };
  const at::Tensor tokens_BT = at::randint(V, {B, T}, at::kLong);
  const at::Tensor state = ops::wkv4_initial_state(B, C, at::TensorOptions(at::kFloat));
  const double size = static_cast<double>(c10::elementSize(dtype));
  const double plane = size * static_cast<double>(B * T * C);
  const double table = size * static_cast<double>(V * C);
  const double logits = size * static_cast<double>(B * T * V);
  return {
      {"layer_norm_shift_mix",
       {normal({B, T, C}),
        normal({B, T, C}),
        normal({C}),
        normal({C}),
        normal({B, C}),
        normal({2, C})},
       [](const Tensors& in) {
         const auto out = ops::layer_norm_shift_mix(in[0], in[1], in[2], in[3], in[4], in[5], 1e-5);
         return Tensors{out.sum_BTC, out.mixed_J[0], out.mixed_J[1]};
       },
       &plain_shift_mix,
       10 * plane,
       2 * plane},
      {"wkv4 with gate",
       {leaf(-at::rand({C})),
        normal({B, T, C}),
        normal({B, T, C}),
        leaf(at::rand({C})),
        state,
        normal({B, T, C})},
       [](const Tensors& in) {
         return Tensors{ops::wkv4(in[0], in[1], in[2], in[3], in[4], in[5]).y_BTA};
       },
       &plain_wkv4,
       11 * plane,
       3 * plane},
      {"gated_residual",
       {normal({B, T, C}), normal({B, T, C}), normal({B, T, C})},
       [](const Tensors& in) { return Tensors{ops::gated_residual(in[0], in[1], in[2])}; },
       [](const Tensors& in) { return Tensors{in[0] + in[1].sigmoid() * in[2]}; },
       9 * plane,
       3 * plane},
      // In place, so both get a copy.
      {"relu_squared_",
       {normal({B, T, 4 * C})},
       [](const Tensors& in) { return Tensors{ops::relu_squared_(in[0].clone())}; },
       [](const Tensors& in) { return Tensors{in[0].clone().relu().square()}; },
       7 * 4 * plane,
       4 * plane},
      // In place, as well.
      {"cross_entropy_gradient_",
       {normal({B * T, V})},
       [tokens_BT](const Tensors& in) {
         const at::Tensor logits_NV = in[0].detach().clone();
         ops::cross_entropy_gradient_(
             logits_NV, tokens_BT.flatten(), logits_NV.size(1), 1e-4, 1e-3);
         return Tensors{};
       },
       [tokens_BT](const Tensors& in) {
         return Tensors{
             at::nll_loss(at::log_softmax(in[0].clone().to(at::kFloat), 1), tokens_BT.flatten())};
       },
       4 * logits,
       logits},
      // The rows that are looked up; the gradient is as large as the table.
      {"embedding",
       {normal({V, C})},
       [tokens_BT](const Tensors& in) { return Tensors{ops::embedding(in[0], tokens_BT)}; },
       [tokens_BT](const Tensors& in) { return Tensors{at::embedding(in[0], tokens_BT)}; },
       3 * plane + table,
       std::min(plane, table) + table},
  };
}

OpCase adamw_case(const StepShape& shape) {
  const int64_t count = RwkvModel(shape.model)->num_parameters();
  // Four operands are read, and three of them written: but for what a cache may keep.
  const auto operand_bytes =
      static_cast<double>(16 * count + std::max<int64_t>(12 * count - CacheSweeper::kBytes, 0));
  const auto buffer = [&] { return at::rand({count}); };
  at::Tensor control = ops::make_adamw_control({});
  ops::begin_adamw(control, at::ones({}, at::kDouble), at::ones({}), {});
  control.select(0, ops::kControlLr).fill_(1e-4);
  return {
      "adamw_",
      {buffer(), buffer(), buffer(), buffer()},
      [control, count](const Tensors& in) {
        ops::AdamwBuffers buffers{
            .master = in[0], .weights = {}, .low = {}, .m = in[1], .v = in[2], .gradient = in[3]};
        ops::adamw_(buffers, {{.end = count, .weight_decay = 0.1}}, control, {});
        return Tensors{};
      },
      &plain_adamw,
      28.0 * static_cast<double>(count),
      operand_bytes};
}

OpCase few_rows_case(const StepShape& shape, at::ScalarType dtype) {
  const int64_t C = shape.model.n_embd, V = shape.model.vocab_size;
  const double size = static_cast<double>(c10::elementSize(dtype));
  return {"few_rows_linear",
          {at::randn({1, 1, C}, dtype), at::randn({V, C}, dtype)},
          [](const Tensors& in) {
            ops::few_rows_linear(in[0], in[1]);
            return Tensors{};
          },
          [](const Tensors& in) {
            at::linear(in[0], in[1]);
            return Tensors{};
          },
          size * static_cast<double>(V * C),
          size * static_cast<double>(V * C),
          /*reads_alone=*/true};
}

}  // namespace

std::vector<BenchRow> bench_ops(const StepShape& shape, at::ScalarType dtype, int64_t repeats) {
  Rates rates;
  rates.measure();
  std::vector<OpCase> cases = training_cases(shape, dtype);
  if (dtype == at::kFloat) {
    cases.push_back(adamw_case(shape));
  }
  cases.push_back(few_rows_case(shape, dtype));
  CacheSweeper sweeper;
  std::vector<OpTimes> times;
  for (const OpCase& op : cases) {
    times.push_back(time_case(op, sweeper, repeats));
  }
  rates.measure();
  std::vector<BenchRow> rows;
  for (size_t i = 0; i < cases.size(); ++i) {
    const double rate = cases[i].reads_alone ? rates.read : std::max(rates.update, rates.read);
    const double moved_per_s = cases[i].moved_bytes / times[i].ours.median * 1000;
    rows.push_back({.what = cases[i].name + (dtype == at::kBFloat16 ? " bf16" : " fp32"),
                    .ms = times[i].ours,
                    .figures = {{"plain_ms", times[i].plain.median},
                                {"floor_ms", cases[i].operand_bytes / rate * 1000},
                                {"gb_per_s", moved_per_s / 1e9},
                                {"of_copy", moved_per_s / rates.copy}},
                    .conditions = {{"threads", at::get_num_threads()},
                                   {"update_gb_per_s", rates.update / 1e9},
                                   {"copy_gb_per_s", rates.copy / 1e9},
                                   {"read_gb_per_s", rates.read / 1e9}}});
  }
  return rows;
}

}  // namespace rwkv
