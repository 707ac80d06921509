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

// Elements as two vectors. Of bf16 the even ones and the odd ones: halves of 32-bit words need a
// shift or a mask alone, where elements in order would need shuffles.
template <typename Vector>
inline constexpr int64_t kPair = 2 * kLanes<Vector>;
// Rows of x are padded to whole pairs of every vector.
constexpr int64_t kPadding = 32;
template <typename Vector>
struct Pair {
  Vector first, second;
};
template <typename Vector>
RWKV_INLINE Pair<Vector> load_pair(const float* from) {
  return {load_lanes<Vector>(from), load_lanes<Vector>(from + kLanes<Vector>)};
}
template <typename Vector>
RWKV_INLINE Pair<Vector> load_pair(const Bf16* from) {
  SameLanes<Vector, uint32_t> words;
  std::memcpy(&words, from, sizeof words);
  const auto even = words << 16;
  const auto odd = words & 0xffff0000u;
  Pair<Vector> pair;
  std::memcpy(&pair.first, &even, sizeof even);
  std::memcpy(&pair.second, &odd, sizeof odd);
  return pair;
}
// Of the last `count` elements of a row, then zeros.
template <typename Vector, typename Element>
RWKV_INLINE Pair<Vector> load_pair(const Element* from, int64_t count) {
  Element padded[kPair<Vector>] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Element));
  return load_pair<Vector>(padded);
}

// y[i] = weight[i] . x for `kRows` rows of W; x as widen_row leaves it.
template <typename Vector, int64_t kRows, typename Element>
RWKV_INLINE void dot_rows(const Element* weight, const float* x, int64_t size, Element* y) {
  Vector first[kRows] = {};
  Vector second[kRows] = {};
  int64_t i = 0;
  for (; i + kPair<Vector> <= size; i += kPair<Vector>) {
    const Pair of_x = load_pair<Vector>(x + i);
    for (int64_t row = 0; row < kRows; ++row) {
      // Rows are so short that the processor's own prefetching barely starts: 12.8 ms a token of
      // L12 D768 V50277 in bf16 without this, 9.4 with it. Past the end it does nothing.
      for (int64_t line = 0; line < kPair<Vector>; line += int64_t{64 / sizeof(Element)}) {
        __builtin_prefetch(weight + (row + 2 * kRows) * size + i + line);
      }
      const Pair of_weight = load_pair<Vector>(weight + row * size + i);
      first[row] += of_weight.first * of_x.first;
      second[row] += of_weight.second * of_x.second;
    }
  }
  if (i < size) {
    const Pair of_x = load_pair<Vector>(x + i);
    for (int64_t row = 0; row < kRows; ++row) {
      const Pair of_weight = load_pair<Vector>(weight + row * size + i, size - i);
      first[row] += of_weight.first * of_x.first;
      second[row] += of_weight.second * of_x.second;
    }
  }
  for (int64_t row = 0; row < kRows; ++row) {
    store_lanes(y + row, Vector{} + sum_of_lanes(first[row] + second[row]), 1);
  }
}

template <typename Vector, typename Element>
RWKV_INLINE void dot_all_rows(
    const Element* weight, const float* x, int64_t size, int64_t rows, Element* y) {
  int64_t row = 0;
  for (; row + kRowsAtOnce <= rows; row += kRowsAtOnce) {
    dot_rows<Vector, kRowsAtOnce>(weight + row * size, x, size, y + row);
  }
  for (; row < rows; ++row) {
    dot_rows<Vector, 1>(weight + row * size, x, size, y + row);
  }
}

// x in fp32, in the order of load_pair, padded with zeros to whole pairs.
template <typename Vector, typename Element>
RWKV_INLINE void widen_row(const Element* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; i += kPair<Vector>) {
    const Pair pair = i + kPair<Vector> <= size ? load_pair<Vector>(from + i)
                                                : load_pair<Vector>(from + i, size - i);
    store_lanes(to + i, pair.first);
    store_lanes(to + i + kLanes<Vector>, pair.second);
  }
}

template <typename Element>
void multiply(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& y_NO) {
  const int64_t num_x = x_NI.size(0), size = weight_OI.size(1), rows = weight_OI.size(0);
  const int64_t padded = (size + kPadding - 1) / kPadding * kPadding;
  const auto* x = static_cast<const Element*>(x_NI.const_data_ptr());
  const auto* weight = static_cast<const Element*>(weight_OI.const_data_ptr());
  auto* y = static_cast<Element*>(y_NO.mutable_data_ptr());
  std::vector<float> wide(static_cast<size_t>(num_x * padded));
  for (int64_t n = 0; n < num_x; ++n) {
    with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      widen_row<Vector>(x + n * size, wide.data() + n * padded, size);
    });
  }
  at::parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    // In stretches that stay in the first-level cache while every row of x passes.
    constexpr int64_t kStretch = 8;
    for (int64_t row = begin; row < end; row += kStretch) {
      const int64_t count = std::min(kStretch, end - row);
      for (int64_t n = 0; n < num_x; ++n) {
        with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
          dot_all_rows<Vector>(
              weight + row * size, wide.data() + n * padded, size, count, y + n * rows + row);
        });
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
