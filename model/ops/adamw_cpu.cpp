// CPU kernels of adamw_ and sum_of_squares: one pass over memory each, in blocks that a thread
// takes whole. Floor of adamw_: 16 bytes read and 12 written a parameter, 14 with
// bf16 weights.
#include <cmath>
#include <optional>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/adamw.h"
#include "model/ops/cpu_vector.h"

namespace rwkv::ops {
namespace {

// Blocks of 64 Ki elements: long enough to be worth a thread, and the unit whose sums are added in
// order.
constexpr int64_t kBlock = int64_t{1} << 16;

struct Factors {
  float lr_over_correction1;  // lr / (1 - beta1^n)
  float root_correction2;     // 1 / sqrt(1 - beta2^n)
  float beta1, one_minus_beta1, beta2, one_minus_beta2;
  float eps;
  float keep;  // 1 - lr weight_decay
  float grad_scale;
};

// Pointers at a block's first element.
struct Buffers {
  float* master;
  float* m;
  float* v;
  const float* grad;
  Bf16* weights;  // may be null
};

RWKV_CPU_CLONES void adamw_block(const Buffers& at, int64_t count, const Factors& f) {
  for_each_vector<float>(count, [&](int64_t i, int64_t lanes) RWKV_INLINE_LAMBDA {
    const Float8 g = load_lanes(at.grad + i, lanes) * f.grad_scale;
    const Float8 m = f.beta1 * load_lanes(at.m + i, lanes) + f.one_minus_beta1 * g;
    const Float8 v = f.beta2 * load_lanes(at.v + i, lanes) + f.one_minus_beta2 * g * g;
    const Float8 root = sqrt_lanes(v) * f.root_correction2 + f.eps;
    const Float8 p = f.keep * load_lanes(at.master + i, lanes) - f.lr_over_correction1 * m / root;
    store_lanes(at.m + i, m, lanes);
    store_lanes(at.v + i, v, lanes);
    store_lanes(at.master + i, p, lanes);
    if (at.weights != nullptr) {
      store_lanes(at.weights + i, p, lanes);
    }
  });
}

// Eight running sums, so that the order is fixed and still fills a vector register.
RWKV_CPU_CLONES double squares_block(const float* x, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      const double value = x[i + lane];
      sums[lane] += value * value;
    }
  }
  for (; i < count; ++i) {
    sums[0] += static_cast<double>(x[i]) * x[i];
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

void adamw_cpu(at::Tensor& master,
               at::Tensor& m,
               at::Tensor& v,
               const at::Tensor& grad,
               const std::optional<at::Tensor>& weights,
               double lr,
               double beta1,
               double beta2,
               double eps,
               double weight_decay,
               double grad_scale,
               int64_t step) {
  const auto n = static_cast<double>(step);
  const Factors factors{
      .lr_over_correction1 = static_cast<float>(lr / (1 - std::pow(beta1, n))),
      .root_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, n))),
      .beta1 = static_cast<float>(beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .eps = static_cast<float>(eps),
      .keep = static_cast<float>(1 - lr * weight_decay),
      .grad_scale = static_cast<float>(grad_scale)};
  const Buffers start{
      .master = master.mutable_data_ptr<float>(),
      .m = m.mutable_data_ptr<float>(),
      .v = v.mutable_data_ptr<float>(),
      .grad = grad.const_data_ptr<float>(),
      .weights = weights ? static_cast<Bf16*>(weights->mutable_data_ptr()) : nullptr};
  at::parallel_for(0, master.numel(), kBlock, [&](int64_t begin, int64_t end) {
    const Buffers block{.master = start.master + begin,
                        .m = start.m + begin,
                        .v = start.v + begin,
                        .grad = start.grad + begin,
                        .weights = start.weights == nullptr ? nullptr : start.weights + begin};
    adamw_block(block, end - begin, factors);
  });
}

double sum_of_squares_cpu(const at::Tensor& tensor) {
  const int64_t count = tensor.numel();
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const float* const data = tensor.const_data_ptr<float>();
  std::vector<double> sums(static_cast<size_t>(blocks));
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock;
      sums[static_cast<size_t>(block)] =
          squares_block(data + first, std::min(kBlock, count - first));
    }
  });
  double total = 0;
  for (const double sum : sums) {
    total += sum;
  }
  return total;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("adamw_", &adamw_cpu);
  library.impl("sum_of_squares", &sum_of_squares_cpu);
}

}  // namespace
}  // namespace rwkv::ops
