// CPU kernels of cross_entropy. A thread takes whole rows, which stay in its second-level cache
// between the passes: one for the maximum, one for the exponentials and their sum, and for the
// gradient one that scales the exponentials. Those are kept in fp32: over the logits where these
// are fp32, beside them where they are bf16.
#include <algorithm>
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

// One number, with the rounding of the vectors.
template <typename Vector, typename Element>
RWKV_INLINE void store_one(Element* to, LaneOf<Vector> value) {
  store_lanes(to, Vector{} + value, 1);
}

template <typename Vector, typename Element>
RWKV_INLINE LaneOf<Vector> largest(const Element* logits, int64_t size) {
  const Vector nothing = Vector{} - std::numeric_limits<LaneOf<Vector>>::infinity();
  Vector max[kTurns] = {nothing, nothing, nothing, nothing};
  for_each_vector_in_turns<Vector>(size,
                                   [&](int64_t i, int64_t count, auto turn) RWKV_INLINE_LAMBDA {
                                     Vector x = load_lanes<Vector>(logits + i, count);
                                     for (int64_t lane = count; lane < kLanes<Vector>; ++lane) {
                                       x[lane] = nothing[0];
                                     }
                                     max[turn] = max_lanes(x, max[turn]);
                                   });
  return reduce_lanes(max_lanes(max_lanes(max[0], max[1]), max_lanes(max[2], max[3])),
                      [](auto x, auto y) RWKV_INLINE_LAMBDA { return x > y ? x : y; });
}

template <typename Scalar>
struct Maximum {
  Scalar value;
  int64_t block;  // the first that holds it
};
template <typename Vector, typename Element>
RWKV_INLINE Maximum<LaneOf<Vector>> maximum_of_row(const Element* logits, int64_t vocab_size) {
  Maximum<LaneOf<Vector>> max{-std::numeric_limits<LaneOf<Vector>>::infinity(), 0};
  for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
    const auto of_block = largest<Vector>(logits + begin, std::min(kBlock, vocab_size - begin));
    if (of_block > max.value) {
      max = {of_block, begin / kBlock};
    }
  }
  return max;
}

// The sum of e^(l - max) over a row; `keep` gets each vector of them.
template <typename Vector, typename Element, typename Keep>
RWKV_INLINE LaneOf<Vector> sum_of_exponentials(const Element* logits,
                                               int64_t vocab_size,
                                               LaneOf<Vector> max,
                                               const Keep& keep) {
  Vector sums[kTurns] = {};
  for_each_vector_in_turns<Vector>(
      vocab_size, [&](int64_t i, int64_t count, auto turn) RWKV_INLINE_LAMBDA {
        const Vector exponential = exp_lanes(load_lanes<Vector>(logits + i, count) - max);
        keep(i, count, exponential);
        sums[turn] += first_lanes(exponential, count);
      });
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Vector, typename Element>
RWKV_INLINE LaneOf<Vector> loss_of_row(const Element* logits, int64_t vocab_size, int64_t target) {
  const auto max = maximum_of_row<Vector>(logits, vocab_size).value;
  const auto sum = sum_of_exponentials<Vector>(
      logits, vocab_size, max, [](int64_t, int64_t, Vector) RWKV_INLINE_LAMBDA {});
  return std::log(sum) + (max - load_one(logits + target));
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
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE Scalar gradient_of_row(Element* logits,
                                   Scalar* exponentials,
                                   const GradientRow<Scalar>& row) {
  const Maximum<Scalar> max = maximum_of_row<Vector>(logits, row.vocab_size);
  int64_t argmax = max.block * kBlock;
  while (argmax + 1 < row.vocab_size && load_one(logits + argmax) != max.value) {
    ++argmax;
  }
  const Scalar target_logit = load_one(logits + row.target);
  const Scalar sum = sum_of_exponentials<Vector>(
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
  for_each_vector<Vector>(row.vocab_size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(logits + i, load_lanes<Vector>(exponentials + i, count) * factor, count);
  });
  store_one<Vector>(logits + argmax, at_argmax * row.scale);
  store_one<Vector>(logits + row.target, at_target * row.scale);
  std::fill(logits + row.vocab_size, logits + row.padded_size, Element{});
  return std::log(sum) + (max.value - target_logit);
}

template <typename Element>
void losses_of_rows(const at::Tensor& logits_NP,
                    const at::Tensor& targets_N,
                    int64_t vocab_size,
                    const at::Tensor& losses_N) {
  using Scalar = ScalarOf<Element>;
  const int64_t padded_size = logits_NP.size(1);
  const auto* logits = static_cast<const Element*>(logits_NP.const_data_ptr());
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  auto* losses = losses_N.mutable_data_ptr<Scalar>();
  at::parallel_for(0, logits_NP.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      with_vectors<Scalar>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
        losses[n] = loss_of_row<Vector>(logits + n * padded_size, vocab_size, targets[n]);
      });
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
  using Scalar = ScalarOf<Element>;
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
      const GradientRow<Scalar> what{.vocab_size = vocab_size,
                                     .padded_size = padded_size,
                                     .target = targets[n],
                                     .l2wrap = static_cast<Scalar>(l2wrap),
                                     .scale = static_cast<Scalar>(scale)};
      with_vectors<Scalar>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
        losses[n] = gradient_of_row<Vector>(row, exponentials, what);
      });
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
