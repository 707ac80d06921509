// CPU kernels of adamw_ and its numbers: one pass over memory, in blocks that a thread takes whole.
// Floor of adamw_: 16 bytes read and 12 written a parameter, 14 with bf16 weights.
#include <algorithm>
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

// A master in halves: the sum of the bits of weights, as the high half, and low.
template <typename Vector>
RWKV_INLINE Vector join_lanes(const Bf16* weights, const int16_t* low, int64_t lanes) {
  using Words = SameLanes<Vector, uint32_t>;
  SameLanes<Vector, uint16_t> high_bits = {};
  SameLanes<Vector, int16_t> low_bits = {};
  if (lanes == kLanes<Vector>) {
    std::memcpy(&high_bits, weights, sizeof high_bits);
    std::memcpy(&low_bits, low, sizeof low_bits);
  } else {
    std::memcpy(&high_bits, weights, static_cast<size_t>(lanes) * sizeof *weights);
    std::memcpy(&low_bits, low, static_cast<size_t>(lanes) * sizeof *low);
  }
  const auto extended = __builtin_convertvector(low_bits, SameLanes<Vector, int32_t>);
  const Words bits =
      (__builtin_convertvector(high_bits, Words) << 16) + reinterpret_cast<Words>(extended);
  Vector master;
  std::memcpy(&master, &bits, sizeof master);
  return master;
}
template <typename Vector>
RWKV_INLINE void split_lanes(Vector master, Bf16* weights, int16_t* low, int64_t lanes) {
  using Halves = SameLanes<Vector, uint16_t>;
  SameLanes<Vector, uint32_t> bits;
  std::memcpy(&bits, &master, sizeof bits);
  const auto high_bits = __builtin_convertvector((bits + 0x8000) >> 16, Halves);
  const auto low_bits = __builtin_convertvector(bits & 0xffff, Halves);
  if (lanes == kLanes<Vector>) {
    std::memcpy(weights, &high_bits, sizeof high_bits);
    std::memcpy(low, &low_bits, sizeof low_bits);
  } else {
    std::memcpy(weights, &high_bits, static_cast<size_t>(lanes) * sizeof *weights);
    std::memcpy(low, &low_bits, static_cast<size_t>(lanes) * sizeof *low);
  }
}

template <typename Vector, typename Gradient>
RWKV_INLINE void update(const Buffers<Gradient>& block, int64_t count, const Factors& factors) {
  // Copies: what is stored below cannot change them, which the compiler would not know.
  const Buffers<Gradient> at = block;
  const Factors f = factors;
  for_each_vector<Vector>(count, [&](int64_t i, int64_t lanes) RWKV_INLINE_LAMBDA {
    const Vector g = load_lanes<Vector>(at.gradient + i, lanes) * f.grad_scale;
    const Vector m = f.beta1 * load_lanes<Vector>(at.m + i, lanes) + f.one_minus_beta1 * g;
    const Vector v = f.beta2 * load_lanes<Vector>(at.v + i, lanes) + f.one_minus_beta2 * g * g;
    const Vector root = sqrt_lanes(v) * f.root_correction2 + f.eps;
    const Vector before = at.master != nullptr
                              ? load_lanes<Vector>(at.master + i, lanes)
                              : join_lanes<Vector>(at.weights + i, at.low + i, lanes);
    const Vector p = f.keep * before - f.lr_over_correction1 * m / root;
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

// Of doubles.
template <typename Vector, typename Element>
RWKV_INLINE double sum_squares(const Element* x, int64_t count) {
  using Floats = SameLanes<Vector, float>;
  Vector sums[kTurns] = {};
  for_each_vector_in_turns<Vector>(
      count, [&](int64_t i, int64_t lanes, auto turn) RWKV_INLINE_LAMBDA {
        const auto wide = __builtin_convertvector(load_lanes<Floats>(x + i, lanes), Vector);
        sums[turn] += wide * wide;
      });
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
          with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
            update<Vector>(block, end - begin, factors);
          });
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
  if (numbers[kControlSkip] != 0 || numbers[kControlOutlier] != 0) {
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
      with_vectors<double>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
        sums[static_cast<size_t>(block)] =
            sum_squares<Vector>(data + first, std::min(kBlock, count - first));
      });
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
  const bool is_outlier = numbers[kControlLoss] > numbers[kControlLossLimit] ||
                          norm > numbers[kControlGradientNormLimit];
  numbers[kControlOutlier] = is_outlier ? 1 : 0;
  if (numbers[kControlSkip] == 0 && !is_outlier) {
    numbers[kControlSteps] += 1;
  }
}

void split_master_cpu(const at::Tensor& master, at::Tensor& weights, at::Tensor& low) {
  const auto* from = master.const_data_ptr<float>();
  auto* high_bits = static_cast<Bf16*>(weights.mutable_data_ptr());
  auto* low_bits = low.mutable_data_ptr<int16_t>();
  at::parallel_for(0, master.numel(), kBlock, [&](int64_t begin, int64_t end) {
    with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      for_each_vector<Vector>(end - begin, [&](int64_t i, int64_t lanes) RWKV_INLINE_LAMBDA {
        const int64_t at = begin + i;
        split_lanes(load_lanes<Vector>(from + at, lanes), high_bits + at, low_bits + at, lanes);
      });
    });
  });
}

at::Tensor join_master_cpu(const at::Tensor& weights, const at::Tensor& low) {
  at::Tensor master = at::empty(weights.sizes(), weights.options().dtype(at::kFloat));
  auto* to = master.mutable_data_ptr<float>();
  const auto* high_bits = static_cast<const Bf16*>(weights.const_data_ptr());
  const auto* low_bits = low.const_data_ptr<int16_t>();
  at::parallel_for(0, master.numel(), kBlock, [&](int64_t begin, int64_t end) {
    with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      for_each_vector<Vector>(end - begin, [&](int64_t i, int64_t lanes) RWKV_INLINE_LAMBDA {
        const int64_t at = begin + i;
        store_lanes(to + at, join_lanes<Vector>(high_bits + at, low_bits + at, lanes), lanes);
      });
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
