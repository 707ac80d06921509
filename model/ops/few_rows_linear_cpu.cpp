// CPU kernel of few_rows_linear. A thread takes a stretch of W's rows, four at a time: x is widened
// once, and four rows of W share each of its vectors. Two sums a row hide the latency of adding.
#include <algorithm>
#include <cstring>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/few_rows_linear.h"

namespace rwkv::ops {
namespace {

constexpr int64_t kRowsAtOnce = 4;
// Rows of W that are worth a second thread: about 10 us of reading at 768 columns.
constexpr int64_t kGrain = 64;

// Sixteen elements as two vectors. Of bf16 the even ones and the odd ones: halves of 32-bit words
// need a shift or a mask alone, where elements in order would need shuffles.
constexpr int64_t kPair = 16;
struct Pair {
  Float8 first, second;
};
RWKV_INLINE Pair load_pair(const float* from) {
  return {load_lanes(from), load_lanes(from + 8)};
}
RWKV_INLINE Pair load_pair(const Bf16* from) {
  Uint8x32 words;
  std::memcpy(&words, from, sizeof words);
  const Uint8x32 even = words << 16;
  const Uint8x32 odd = words & 0xffff0000u;
  Pair pair;
  std::memcpy(&pair.first, &even, sizeof even);
  std::memcpy(&pair.second, &odd, sizeof odd);
  return pair;
}
// Of the last `count` elements of a row, then zeros.
template <typename Element>
RWKV_INLINE Pair load_pair(const Element* from, int64_t count) {
  Element padded[kPair] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Element));
  return load_pair(padded);
}

// y[i] = weight[i] . x for `kRows` rows of W; x as widen_row leaves it.
template <int64_t kRows, typename Element>
RWKV_INLINE void dot_rows(const Element* weight, const float* x, int64_t size, Element* y) {
  Float8 first[kRows] = {};
  Float8 second[kRows] = {};
  int64_t i = 0;
  for (; i + kPair <= size; i += kPair) {
    const Pair of_x = load_pair(x + i);
    for (int64_t row = 0; row < kRows; ++row) {
      // Rows are so short that the processor's own prefetching barely starts: 12.8 ms a token of
      // L12 D768 V50277 in bf16 without this, 9.4 with it. Past the end it does nothing.
      __builtin_prefetch(weight + (row + 2 * kRows) * size + i);
      const Pair of_weight = load_pair(weight + row * size + i);
      first[row] += of_weight.first * of_x.first;
      second[row] += of_weight.second * of_x.second;
    }
  }
  if (i < size) {
    const Pair of_x = load_pair(x + i);
    for (int64_t row = 0; row < kRows; ++row) {
      const Pair of_weight = load_pair(weight + row * size + i, size - i);
      first[row] += of_weight.first * of_x.first;
      second[row] += of_weight.second * of_x.second;
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    store_lanes(y + row, Float8{} + sum_of_lanes(first[row] + second[row]), 1);
  }
}

template <typename Element>
RWKV_INLINE void dot_all_rows(
    const Element* weight, const float* x, int64_t size, int64_t rows, Element* y) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    dot_rows<kRowsAtOnce>(weight + row * size, x, size, y + row);
  }
  for (; row < rows; ++row) {
    dot_rows<1>(weight + row * size, x, size, y + row);
  }
}

// x in fp32, in the order of load_pair, padded with zeros to whole pairs.
template <typename Element>
RWKV_INLINE void widen_row(const Element* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kPair) {
    const Pair pair = i + kPair <= size ? load_pair(from + i) : load_pair(from + i, size - i);
    store_lanes(to + i, pair.first);
    store_lanes(to + i + 8, pair.second);
  }
}

#define RWKV_KERNELS(Element)                                                          \
  RWKV_CPU_CLONES void dot_kernel(                                                     \
      const Element* weight, const float* x, int64_t size, int64_t rows, Element* y) { \
    dot_all_rows(weight, x, size, rows, y);                                            \
  }                                                                                    \
  RWKV_CPU_CLONES void widen_kernel(const Element* from, float* to, int64_t size) {    \
    widen_row(from, to, size);                                                         \
  }
RWKV_KERNELS(float)
RWKV_KERNELS(Bf16)
#undef RWKV_KERNELS

template <typename Element>
void multiply(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& y_NO) {
  const int64_t num_x = x_NI.size(0), size = weight_OI.size(1), rows = weight_OI.size(0);
  const int64_t padded = (size + kPair - 1) / kPair * kPair;
  const auto* x = static_cast<const Element*>(x_NI.const_data_ptr());
  const auto* weight = static_cast<const Element*>(weight_OI.const_data_ptr());
  auto* y = static_cast<Element*>(y_NO.mutable_data_ptr());
  std::vector<float> wide(static_cast<size_t>(num_x * padded));
  for (int64_t n = 0; n < num_x; ++n) {
    widen_kernel(x + n * size, wide.data() + n * padded, size);
  }
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    // In stretches that stay in the first-level cache while every row of x passes.
    constexpr int64_t kStretch = 8;
    for (int64_t row = begin; row < end; row += kStretch) {
      const int64_t count = std::min(kStretch, end - row);
      for (int64_t n = 0; n < num_x; ++n) {
        dot_kernel(weight + row * size, wide.data() + n * padded, size, count, y + n * rows + row);
      }
    }
  });
}

at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight_OI) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight_OI.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  const auto kernel = x.scalar_type() == at::kBFloat16 ? &multiply<Bf16> : &multiply<float>;
  kernel(x.view({-1, weight_OI.size(1)}), weight_OI, y.view({-1, weight_OI.size(0)}));
  return y;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("few_rows_linear", &few_rows_linear_cpu);
}

}  // namespace
}  // namespace rwkv::ops
