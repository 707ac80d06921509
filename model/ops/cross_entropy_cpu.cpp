// CPU kernels of cross_entropy. A thread takes whole rows, which stay in its second-level cache
// between the passes: one for the maximum, one for the exponentials and their sum, and for the
// gradient one that scales the exponentials. Those are kept in fp32: over the logits where these
// are fp32, beside them where they are bf16.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/cross_entropy.h"

namespace rwkv::ops {
namespace {

// The place of a row's maximum is searched in one block alone.
constexpr int64_t kBlock = 1024;

// One element as a number, and back with the rounding of the vectors.
template <typename Scalar>
RWKV_INLINE Scalar read_one(const Scalar* from) {
  return *from;
}
RWKV_INLINE float read_one(const Bf16* from) {
  return std::bit_cast<float>(uint32_t{from->bits} << 16);
}
template <typename Element>
RWKV_INLINE void write_one(Element* to, typename VectorOf<Element>::Scalar value) {
  store_lanes(to, typename VectorOf<Element>::Vector{} + value, 1);
}

template <typename Element, typename Scalar>
RWKV_INLINE Scalar largest(const Element* logits, int64_t size) {
  using Vector = typename VectorOf<Element>::Vector;
  constexpr int64_t kLanes = VectorOf<Element>::kLanes;
  const Vector nothing = Vector{} - std::numeric_limits<Scalar>::infinity();
  Vector max = nothing;
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    Vector x = load_lanes(logits + i, count);
    for (int64_t lane = count; lane < kLanes; ++lane) {
      x[lane] = nothing[0];
    }
    max = max_lanes(x, max);
  });
  Scalar result = max[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    result = std::max(result, static_cast<Scalar>(max[lane]));
  }
  return result;
}

template <typename Scalar>
struct Maximum {
  Scalar value;
  int64_t block;  // the first that holds it
};
template <typename Element, typename Scalar>
RWKV_INLINE Maximum<Scalar> maximum_of_row(const Element* logits, int64_t vocab_size) {
  Maximum<Scalar> max{-std::numeric_limits<Scalar>::infinity(), 0};
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const auto of_block =
        largest<Element, Scalar>(logits + begin, std::min(kBlock, vocab_size - begin));
    if (of_block > max.value) {
      max = {of_block, begin / kBlock};
    }
  }
  return max;
}

// The sum of e^(l - max) over a row; `keep` gets each vector of them.
// Several running sums would round less, but 1e5 terms in 8 lanes are within 1e-5 of a log.
template <typename Element, typename Scalar, typename Keep>
RWKV_INLINE Scalar
sum_of_exponentials(const Element* logits, int64_t vocab_size, Scalar max, const Keep& keep) {
  using Vector = typename VectorOf<Element>::Vector;
  Vector sum = Vector{};
  for_each_vector<Element>(vocab_size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector exponential = exp_lanes(load_lanes(logits + i, count) - max);
    keep(i, count, exponential);
    sum += first_lanes(exponential, count);
  });
  return sum_of_lanes(sum);
}

template <typename Element, typename Scalar>
RWKV_INLINE Scalar loss_of_row(const Element* logits, int64_t vocab_size, int64_t target) {
  using Vector = typename VectorOf<Element>::Vector;
  const Scalar max = maximum_of_row<Element, Scalar>(logits, vocab_size).value;
  const Scalar sum = sum_of_exponentials(
      logits, vocab_size, max, [](int64_t, int64_t, Vector) RWKV_INLINE_LAMBDA {});
  return std::log(sum) + (max - read_one(logits + target));
}

// What a row's gradient is made of beside its logits.
template <typename Scalar>
struct GradientRow {
  int64_t vocab_size;
  int64_t padded_size;
  int64_t target;
  Scalar l2wrap;
  Scalar scale;
};

//   exponentials  room for vocab_size numbers; may be the logits themselves
// Returns the loss.
template <typename Element, typename Scalar>
RWKV_INLINE Scalar gradient_of_row(Element* logits,
                                   Scalar* exponentials,
                                   const GradientRow<Scalar>& row) {
  using Vector = typename VectorOf<Element>::Vector;
  const Maximum<Scalar> max = maximum_of_row<Element, Scalar>(logits, row.vocab_size);
  int64_t argmax = max.block * kBlock;
  while (argmax + 1 < row.vocab_size && read_one(logits + argmax) != max.value) {
    ++argmax;
  }
  const Scalar target_logit = read_one(logits + row.target);
  const Scalar sum = sum_of_exponentials(
      logits,
      row.vocab_size,
      max.value,
      [&](int64_t i, int64_t count, Vector exponential)
          RWKV_INLINE_LAMBDA { store_lanes(exponentials + i, exponential, count); });
  // The two places that differ, before they are rounded to bf16 without the difference.
  const Scalar penalty = row.l2wrap * max.value;
  const bool same = row.target == argmax;
  const Scalar at_target = exponentials[row.target] / sum - 1 + (same ? penalty : 0);
  const Scalar at_argmax = same ? at_target : exponentials[argmax] / sum + penalty;
  const Scalar factor = row.scale / sum;
  for_each_vector<Element>(row.vocab_size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(logits + i, load_lanes(exponentials + i, count) * factor, count);
  });
  write_one(logits + argmax, at_argmax * row.scale);
  write_one(logits + row.target, at_target * row.scale);
  std::fill(logits + row.vocab_size, logits + row.padded_size, Element{});
  return std::log(sum) + (max.value - target_logit);
}

#define RWKV_KERNELS(Element, Scalar)                                                             \
  RWKV_CPU_CLONES Scalar loss_kernel(const Element* logits, int64_t vocab_size, int64_t target) { \
    return loss_of_row<Element, Scalar>(logits, vocab_size, target);                              \
  }                                                                                               \
  RWKV_CPU_CLONES Scalar gradient_kernel(                                                         \
      Element* logits, Scalar* exponentials, const GradientRow<Scalar>& row) {                    \
    return gradient_of_row(logits, exponentials, row);                                            \
  }
RWKV_KERNELS(float, float)
RWKV_KERNELS(Bf16, float)
RWKV_KERNELS(double, double)
#undef RWKV_KERNELS

template <typename Element>
void losses_of_rows(const at::Tensor& logits_NP,
                    const at::Tensor& targets_N,
                    int64_t vocab_size,
                    const at::Tensor& losses_N) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const int64_t padded_size = logits_NP.size(1);
  const auto* logits = static_cast<const Element*>(logits_NP.const_data_ptr());
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  auto* losses = losses_N.mutable_data_ptr<Scalar>();
  at::parallel_for(0, logits_NP.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      losses[n] = loss_kernel(logits + n * padded_size, vocab_size, targets[n]);
    }
  });
}

template <typename Element>
void gradient_of_rows(const at::Tensor& logits_NP,
                      const at::Tensor& targets_N,
                      int64_t vocab_size,
                      double l2wrap,
                      double scale,
                      const at::Tensor& losses_N) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const int64_t padded_size = logits_NP.size(1);
  auto* logits = static_cast<Element*>(logits_NP.mutable_data_ptr());
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  auto* losses = losses_N.mutable_data_ptr<Scalar>();
  at::parallel_for(0, logits_NP.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Element* const row = logits + n * padded_size;
      Scalar* exponentials = nullptr;
      if constexpr (std::is_same_v<Element, Scalar>) {
        exponentials = row;
      } else {
        static thread_local std::vector<Scalar> beside;
        beside.resize(static_cast<size_t>(vocab_size));
        exponentials = beside.data();
      }
      losses[n] = gradient_kernel(row,
                                  exponentials,
                                  GradientRow<Scalar>{.vocab_size = vocab_size,
                                                      .padded_size = padded_size,
                                                      .target = targets[n],
                                                      .l2wrap = static_cast<Scalar>(l2wrap),
                                                      .scale = static_cast<Scalar>(scale)});
    }
  });
}

at::Tensor empty_losses(const at::Tensor& logits_NP) {
  const bool is_double = logits_NP.scalar_type() == at::kDouble;
  return at::empty(
      {logits_NP.size(0)},
      logits_NP.options().requires_grad(false).dtype(is_double ? at::kDouble : at::kFloat));
}

at::Tensor cross_entropy_cpu(const at::Tensor& logits_NP,
                             const at::Tensor& targets_N,
                             int64_t vocab_size) {
  at::Tensor losses_N = empty_losses(logits_NP);
  const auto kernel = logits_NP.scalar_type() == at::kBFloat16 ? &losses_of_rows<Bf16>
                      : logits_NP.scalar_type() == at::kFloat  ? &losses_of_rows<float>
                                                               : &losses_of_rows<double>;
  kernel(logits_NP, targets_N, vocab_size, losses_N);
  return losses_N;
}

at::Tensor cross_entropy_gradient_cpu(const at::Tensor& logits_NP,
                                      const at::Tensor& targets_N,
                                      int64_t vocab_size,
                                      double l2wrap,
                                      double scale) {
  at::Tensor losses_N = empty_losses(logits_NP);
  const auto kernel = logits_NP.scalar_type() == at::kBFloat16 ? &gradient_of_rows<Bf16>
                      : logits_NP.scalar_type() == at::kFloat  ? &gradient_of_rows<float>
                                                               : &gradient_of_rows<double>;
  kernel(logits_NP, targets_N, vocab_size, l2wrap, scale, losses_N);
  return losses_N;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("cross_entropy", &cross_entropy_cpu);
  library.impl("cross_entropy_gradient_", &cross_entropy_gradient_cpu);
}

}  // namespace
}  // namespace rwkv::ops
