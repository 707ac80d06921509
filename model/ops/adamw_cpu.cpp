// CPU kernels of adamw_ and its numbers: one pass over memory, in blocks that a thread takes whole.
// Floor of adamw_: 16 bytes read and 12 written a parameter, 14 with bf16 weights.
#include <algorithm>
#include <bit>
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
template <typename Gradient>
struct Buffers {
  float* master;  // null: weights and low are it
  Bf16* weights;  // may be null
  int16_t* low;
  float* m;
  float* v;
  const Gradient* gradient;
};

// The high half of the sum is what is stored as bf16.
RWKV_INLINE Float8 join_lanes(const Bf16* weights, const int16_t* low, int64_t lanes) {
  alignas(32) uint32_t bits[8] = {};
  for (int64_t lane = 0; lane < lanes; ++lane) {
    bits[lane] = (static_cast<uint32_t>(weights[lane].bits) << 16) +
                 static_cast<uint32_t>(static_cast<int32_t>(low[lane]));
  }
  Float8 master;
  std::memcpy(&master, bits, sizeof master);
  return master;
}
RWKV_INLINE void split_lanes(Float8 master, Bf16* weights, int16_t* low, int64_t lanes) {
  alignas(32) uint32_t bits[8];
  std::memcpy(bits, &master, sizeof bits);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    weights[lane].bits = static_cast<uint16_t>((bits[lane] + 0x8000) >> 16);
    low[lane] = static_cast<int16_t>(bits[lane] & 0xffff);
  }
}

template <typename Gradient>
RWKV_INLINE void update(const Buffers<Gradient>& at, int64_t count, const Factors& f) {
  for_each_vector<float>(count, [&](int64_t i, int64_t lanes) RWKV_INLINE_LAMBDA {
    const Float8 g = load_lanes(at.gradient + i, lanes) * f.grad_scale;
    const Float8 m = f.beta1 * load_lanes(at.m + i, lanes) + f.one_minus_beta1 * g;
    const Float8 v = f.beta2 * load_lanes(at.v + i, lanes) + f.one_minus_beta2 * g * g;
    const Float8 root = sqrt_lanes(v) * f.root_correction2 + f.eps;
    const Float8 before = at.master != nullptr ? load_lanes(at.master + i, lanes)
                                               : join_lanes(at.weights + i, at.low + i, lanes);
    const Float8 p = f.keep * before - f.lr_over_correction1 * m / root;
    store_lanes(at.m + i, m, lanes);
    store_lanes(at.v + i, v, lanes);
    if (at.master == nullptr) {
      split_lanes(p, at.weights + i, at.low + i, lanes);
      return;
    }
    store_lanes(at.master + i, p, lanes);
    if (at.weights != nullptr) {
      store_lanes(at.weights + i, p, lanes);
    }
  });
}
RWKV_CPU_CLONES void adamw_block(const Buffers<float>& at, int64_t count, const Factors& f) {
  update(at, count, f);
}
RWKV_CPU_CLONES void adamw_block(const Buffers<Bf16>& at, int64_t count, const Factors& f) {
  update(at, count, f);
}

RWKV_INLINE double widen(float x) {
  return x;
}
RWKV_INLINE double widen(Bf16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
// Eight running sums, so that the order is fixed and still fills a vector register.
template <typename Element>
RWKV_INLINE double sum_squares(const Element* x, int64_t count) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t lane = 0; lane < 8; ++lane) {
      const double value = widen(x[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (; i < count; ++i) {
    sums[0] += widen(x[i]) * widen(x[i]);
  }
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}
RWKV_CPU_CLONES double squares_block(const float* x, int64_t count) {
  return sum_squares(x, count);
}
RWKV_CPU_CLONES double squares_block(const Bf16* x, int64_t count) {
  return sum_squares(x, count);
}

template <typename Element>
Element* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? static_cast<Element*>(tensor->mutable_data_ptr()) : nullptr;
}
template <typename Element>
Element* advance(Element* pointer, int64_t count) {
  return pointer == nullptr ? nullptr : pointer + count;
}

template <typename Gradient>
void update_groups(const Buffers<Gradient>& all,
                   at::IntArrayRef bounds,
                   at::ArrayRef<double> lr_scales,
                   at::ArrayRef<double> weight_decays,
                   double base_lr,
                   double correction1,
                   Factors factors) {
  for (size_t group = 0; group < lr_scales.size(); ++group) {
    const double lr = base_lr * lr_scales[group];
    factors.lr_over_correction1 = static_cast<float>(lr / correction1);
    factors.keep = static_cast<float>(1 - lr * weight_decays[group]);
    at::parallel_for(
        bounds[2 * group], bounds[2 * group + 1], kBlock, [&](int64_t begin, int64_t end) {
          const Buffers<Gradient> block{.master = advance(all.master, begin),
                                        .weights = advance(all.weights, begin),
                                        .low = advance(all.low, begin),
                                        .m = all.m + begin,
                                        .v = all.v + begin,
                                        .gradient = all.gradient + begin};
          adamw_block(block, end - begin, factors);
        });
  }
}

void adamw_cpu(const std::optional<at::Tensor>& master,
               const std::optional<at::Tensor>& weights,
               const std::optional<at::Tensor>& low,
               at::Tensor& m,
               at::Tensor& v,
               const at::Tensor& gradient,
               at::IntArrayRef bounds,
               at::ArrayRef<double> lr_scales,
               at::ArrayRef<double> weight_decays,
               const at::Tensor& control,
               double beta1,
               double beta2,
               double eps) {
  const auto* numbers = control.const_data_ptr<double>();
  if (numbers[kControlSkip] != 0) {
    return;
  }
  const double n = numbers[kControlSteps];
  const Factors factors{
      .lr_over_correction1 = 0,
      .root_correction2 = static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, n))),
      .beta1 = static_cast<float>(beta1),
      .one_minus_beta1 = static_cast<float>(1 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1 - beta2),
      .eps = static_cast<float>(eps),
      .keep = 1,
      .grad_scale = static_cast<float>(numbers[kControlClip])};
  const auto update_all = [&]<typename Gradient>(const Gradient*) {
    update_groups(
        Buffers<Gradient>{.master = pointer<float>(master),
                          .weights = pointer<Bf16>(weights),
                          .low = pointer<int16_t>(low),
                          .m = m.mutable_data_ptr<float>(),
                          .v = v.mutable_data_ptr<float>(),
                          .gradient = static_cast<const Gradient*>(gradient.const_data_ptr())},
        bounds,
        lr_scales,
        weight_decays,
        numbers[kControlLr],
        1 - std::pow(beta1, n),
        factors);
  };
  if (gradient.scalar_type() == at::kBFloat16) {
    update_all(static_cast<const Bf16*>(nullptr));
  } else {
    update_all(static_cast<const float*>(nullptr));
  }
}

template <typename Element>
double sum_of_squares(const Element* data, int64_t count) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
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

void add_sum_of_squares_cpu(const at::Tensor& tensor, at::Tensor& sum) {
  *sum.mutable_data_ptr<double>() +=
      tensor.scalar_type() == at::kBFloat16
          ? sum_of_squares(static_cast<const Bf16*>(tensor.const_data_ptr()), tensor.numel())
          : sum_of_squares(tensor.const_data_ptr<float>(), tensor.numel());
}

void begin_adamw_cpu(at::Tensor& control,
                     const at::Tensor& sum_of_squares,
                     const at::Tensor& loss,
                     double clip_norm) {
  auto* numbers = control.mutable_data_ptr<double>();
  const double norm = std::sqrt(*sum_of_squares.const_data_ptr<double>());
  numbers[kControlLoss] = *loss.const_data_ptr<double>();
  numbers[kControlGradientNorm] = norm;
  numbers[kControlClip] = clip_norm > 0 ? std::min(1.0, clip_norm / (norm + 1e-6)) : 1.0;
  if (!std::isfinite(norm) || !std::isfinite(numbers[kControlLoss])) {
    numbers[kControlSkip] = 1;
  }
  if (numbers[kControlSkip] == 0) {
    numbers[kControlSteps] += 1;
  }
}

void split_master_cpu(const at::Tensor& master, at::Tensor& weights, at::Tensor& low) {
  const auto* from = master.const_data_ptr<float>();
  auto* high_bits = static_cast<Bf16*>(weights.mutable_data_ptr());
  auto* low_bits = low.mutable_data_ptr<int16_t>();
  at::parallel_for(0, master.numel(), kBlock, [&](int64_t begin, int64_t end) {
    for_each_vector<float>(end - begin, [&](int64_t i, int64_t lanes) {
      const int64_t at = begin + i;
      split_lanes(load_lanes(from + at, lanes), high_bits + at, low_bits + at, lanes);
    });
  });
}

at::Tensor join_master_cpu(const at::Tensor& weights, const at::Tensor& low) {
  at::Tensor master = at::empty(weights.sizes(), weights.options().dtype(at::kFloat));
  auto* to = master.mutable_data_ptr<float>();
  const auto* high_bits = static_cast<const Bf16*>(weights.const_data_ptr());
  const auto* low_bits = low.const_data_ptr<int16_t>();
  at::parallel_for(0, master.numel(), kBlock, [&](int64_t begin, int64_t end) {
    for_each_vector<float>(end - begin, [&](int64_t i, int64_t lanes) {
      const int64_t at = begin + i;
      store_lanes(to + at, join_lanes(high_bits + at, low_bits + at, lanes), lanes);
    });
  });
  return master;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("add_sum_of_squares", &add_sum_of_squares_cpu);
  library.impl("begin_adamw", &begin_adamw_cpu);
  library.impl("adamw_", &adamw_cpu);
  library.impl("split_master", &split_master_cpu);
  library.impl("join_master", &join_master_cpu);
}

}  // namespace
}  // namespace rwkv::ops
