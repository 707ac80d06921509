// CPU kernels of cross_entropy. A thread takes whole rows, which stay in its second-level cache
// between the passes: forward reads a row for its maximum and again for the sum of exponentials,
// backward reads and writes it once.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/cross_entropy.h"

namespace rwkv::ops {
namespace {

// The place of a row's maximum is searched in one block alone.
constexpr int64_t kBlock = 1024;

template <typename Scalar>
struct RowStatistics {
  Scalar max, log_sum;
  int64_t max_block;  // first block that holds the maximum
};

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

// Several running sums would round less, but 1e5 terms in 8 lanes are within 1e-5 of a log.
template <typename Element, typename Scalar>
RWKV_INLINE RowStatistics<Scalar> forward_row(const Element* logits, int64_t size) {
  using Vector = typename VectorOf<Element>::Vector;
  RowStatistics<Scalar> row{-std::numeric_limits<Scalar>::infinity(), 0, 0};
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const auto max = largest<Element, Scalar>(logits + begin, std::min(kBlock, size - begin));
    if (max > row.max) {
      row.max = max;
      row.max_block = begin / kBlock;
    }
  }
  Vector sum = Vector{};
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    sum += first_lanes(exp_lanes(load_lanes(logits + i, count) - row.max), count);
  });
  row.log_sum = std::log(sum_of_lanes(sum));
  return row;
}

template <typename Element, typename Scalar>
RWKV_INLINE void backward_row(Element* logits,
                              int64_t size,
                              RowStatistics<Scalar> statistics,
                              Scalar dloss) {
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const auto log_softmax = load_lanes(logits + i, count) - statistics.max - statistics.log_sum;
    store_lanes(logits + i, exp_lanes(log_softmax) * dloss, count);
  });
}

#define RWKV_KERNELS(Element, Scalar)                                                         \
  RWKV_CPU_CLONES RowStatistics<Scalar> forward_kernel(const Element* logits, int64_t size) { \
    return forward_row<Element, Scalar>(logits, size);                                        \
  }                                                                                           \
  RWKV_CPU_CLONES void backward_kernel(                                                       \
      Element* logits, int64_t size, RowStatistics<Scalar> statistics, Scalar dloss) {        \
    backward_row(logits, size, statistics, dloss);                                            \
  }
RWKV_KERNELS(float, float)
RWKV_KERNELS(Bf16, float)
RWKV_KERNELS(double, double)
#undef RWKV_KERNELS

// One element as a number, and back with the rounding of the vectors.
template <typename Scalar>
Scalar read_one(const Scalar* from) {
  return *from;
}
float read_one(const Bf16* from) {
  return std::bit_cast<float>(uint32_t{from->bits} << 16);
}
template <typename Element>
void write_one(Element* to, typename VectorOf<Element>::Scalar value) {
  store_lanes(to, typename VectorOf<Element>::Vector{} + value, 1);
}

void check_targets(const at::Tensor& targets_N, int64_t vocab_size) {
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < targets_N.numel(); ++n) {
    TORCH_CHECK(targets[n] >= 0 && targets[n] < vocab_size,
                "cross_entropy: target ",
                targets[n],
                " of row ",
                n,
                " is not in [0, ",
                vocab_size,
                ")");
  }
}

template <typename Element>
void forward(const at::Tensor& logits_NV,
             const at::Tensor& targets_N,
             const at::Tensor& losses_N,
             const at::Tensor& statistics_N2,
             const at::Tensor& argmax_N) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const int64_t vocab_size = logits_NV.size(1);
  const auto* logits = static_cast<const Element*>(logits_NV.const_data_ptr());
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  auto* losses = losses_N.mutable_data_ptr<Scalar>();
  auto* statistics = statistics_N2.mutable_data_ptr<Scalar>();
  auto* argmax = argmax_N.mutable_data_ptr<int64_t>();
  at::parallel_for(0, logits_NV.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const Element* row = logits + n * vocab_size;
      const RowStatistics<Scalar> found = forward_kernel(row, vocab_size);
      statistics[2 * n] = found.max;
      statistics[2 * n + 1] = found.log_sum;
      losses[n] = found.log_sum + (found.max - read_one(row + targets[n]));
      argmax[n] = found.max_block * kBlock;
      while (argmax[n] + 1 < vocab_size && read_one(row + argmax[n]) != found.max) {
        ++argmax[n];
      }
    }
  });
}

template <typename Element>
void backward(at::Tensor& logits_NV,
              const at::Tensor& targets_N,
              const at::Tensor& statistics_N2,
              const at::Tensor& argmax_N,
              const at::Tensor& dlosses_N,
              double l2wrap) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const int64_t vocab_size = logits_NV.size(1);
  auto* logits = static_cast<Element*>(logits_NV.mutable_data_ptr());
  const auto* targets = targets_N.const_data_ptr<int64_t>();
  const auto* statistics = statistics_N2.const_data_ptr<Scalar>();
  const auto* argmax = argmax_N.const_data_ptr<int64_t>();
  const auto* dlosses = dlosses_N.const_data_ptr<Scalar>();
  at::parallel_for(0, logits_NV.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      Element* row = logits + n * vocab_size;
      const RowStatistics<Scalar> saved{statistics[2 * n], statistics[2 * n + 1], 0};
      // The two places that differ, before they are rounded to bf16 without the difference.
      const auto softmax = [&](int64_t v) {
        return std::exp(read_one(row + v) - saved.max - saved.log_sum);
      };
      const Scalar penalty = static_cast<Scalar>(l2wrap) * saved.max;
      const int64_t target = targets[n];
      const bool same = target == argmax[n];
      const Scalar at_target = softmax(target) - 1 + (same ? penalty : 0);
      const Scalar at_argmax = same ? at_target : softmax(argmax[n]) + penalty;
      backward_kernel(row, vocab_size, saved, dlosses[n]);
      write_one(row + argmax[n], at_argmax * dlosses[n]);
      write_one(row + target, at_target * dlosses[n]);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cpu(
    const at::Tensor& logits_NV, const at::Tensor& targets_N) {
  check_targets(targets_N, logits_NV.size(1));
  const int64_t rows = logits_NV.size(0);
  const at::TensorOptions exact = logits_NV.options().requires_grad(false).dtype(
      logits_NV.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const at::Tensor losses_N = at::empty({rows}, exact);
  const at::Tensor statistics_N2 = at::empty({rows, 2}, exact);
  const at::Tensor argmax_N = at::empty_like(targets_N);
  const auto kernel = logits_NV.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : logits_NV.scalar_type() == at::kFloat  ? &forward<float>
                                                               : &forward<double>;
  kernel(logits_NV, targets_N, losses_N, statistics_N2, argmax_N);
  return {losses_N, statistics_N2, argmax_N};
}

at::Tensor& cross_entropy_backward_cpu(at::Tensor& logits_NV,
                                       const at::Tensor& targets_N,
                                       const at::Tensor& statistics_N2,
                                       const at::Tensor& argmax_N,
                                       const at::Tensor& dlosses_N,
                                       double l2wrap) {
  const auto kernel = logits_NV.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : logits_NV.scalar_type() == at::kFloat  ? &backward<float>
                                                               : &backward<double>;
  kernel(logits_NV, targets_N, statistics_N2, argmax_N, dlosses_N, l2wrap);
  return logits_NV;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("cross_entropy_forward", &cross_entropy_forward_cpu);
  library.impl("cross_entropy_backward_", &cross_entropy_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
