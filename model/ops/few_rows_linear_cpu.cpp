// CPU kernels of few_rows_linear. Both go through W as it lies in memory, from its beginning to its
// end: four rows at once came at half the rate of reading on an EPYC, which does not read ahead of
// so many streams. W [O, I]: a thread takes a stretch of its rows, each of which gives a number.
// Its transpose [I, O]: a thread takes a stretch of columns, and each row of those is added to the
// sums, which stay in the first-level cache.
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

// Bytes of W that are worth a second thread: 3 to 10 us of reading.
constexpr int64_t kGrainBytes = int64_t{96} << 10;

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

// weight . x for a row of W; x as widen_row leaves it.
template <typename Vector, typename Element>
RWKV_INLINE float dot_row(const Element* weight, const float* x, int64_t size) {
  Vector first = {};
  Vector second = {};
  const auto add = [&](int64_t i, Pair<Vector> of_weight) RWKV_INLINE_LAMBDA {
    const Pair of_x = load_pair<Vector>(x + i);
    first += of_weight.first * of_x.first;
    second += of_weight.second * of_x.second;
  };
  int64_t i = 0;
  for (; i + kPair<Vector> <= size; i += kPair<Vector>) {
    add(i, load_pair<Vector>(weight + i));
  }
  if (i < size) {
    add(i, load_pair<Vector>(weight + i, size - i));
  }
  return sum_of_lanes(first + second);
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

int64_t grain(int64_t bytes_of_one) {
  return std::max<int64_t>(kGrainBytes / std::max<int64_t>(bytes_of_one, 1), 1);
}

template <typename Element>
void multiply_rows(const at::Tensor& x_NI, const at::Tensor& weight_OI, const at::Tensor& y_NO) {
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
  at::parallel_for(
      0, rows, grain(size * int64_t{sizeof(Element)}), [&](int64_t begin, int64_t end) {
        with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
          for (int64_t row = begin; row < end; ++row) {
            // It stays in the first-level cache while every row of x passes.
            for (int64_t n = 0; n < num_x; ++n) {
              const float sum =
                  dot_row<Vector>(weight + row * size, wide.data() + n * padded, size);
              store_lanes(y + n * rows + row, Vector{} + sum, 1);
            }
          }
        });
      });
}

template <typename Element>
void multiply_columns(const at::Tensor& x_NI, const at::Tensor& weight_IO, const at::Tensor& y_NO) {
  const int64_t num_x = x_NI.size(0), size = weight_IO.size(0), columns = weight_IO.size(1);
  const auto* x = static_cast<const Element*>(x_NI.const_data_ptr());
  const auto* weight = static_cast<const Element*>(weight_IO.const_data_ptr());
  auto* y = static_cast<Element*>(y_NO.mutable_data_ptr());
  at::parallel_for(
      0, columns, grain(size * int64_t{sizeof(Element)}), [&](int64_t begin, int64_t end) {
        const int64_t width = end - begin, padded = (width + kPadding - 1) / kPadding * kPadding;
        std::vector<float> sums(static_cast<size_t>(num_x * padded));
        with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
          for (int64_t i = 0; i < size; ++i) {
            for (int64_t n = 0; n < num_x; ++n) {
              const float factor = load_one(x + n * size + i);
              float* const sum = sums.data() + n * padded;
              for_each_vector<Vector>(width, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
                const Vector w = load_lanes<Vector>(weight + i * columns + begin + c, count);
                store_lanes(sum + c, load_lanes<Vector>(sum + c) + w * factor);
              });
            }
          }
          for (int64_t n = 0; n < num_x; ++n) {
            for_each_vector<Vector>(width, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
              store_lanes(y + n * columns + begin + c,
                          load_lanes<Vector>(sums.data() + n * padded + c),
                          count);
            });
          }
        });
      });
}

at::Tensor few_rows_linear_cpu(const at::Tensor& x, const at::Tensor& weight_OI) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = weight_OI.size(0);
  at::Tensor y = at::empty(sizes, x.options());
  const bool is_bf16 = x.scalar_type() == at::kBFloat16;
  const at::Tensor x_NI = x.view({-1, weight_OI.size(1)}), y_NO = y.view({-1, weight_OI.size(0)});
  if (weight_OI.is_contiguous()) {
    (is_bf16 ? &multiply_rows<Bf16> : &multiply_rows<float>)(x_NI, weight_OI, y_NO);
  } else {
    (is_bf16 ? &multiply_columns<Bf16> : &multiply_columns<float>)(x_NI, weight_OI.t(), y_NO);
  }
  return y;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("few_rows_linear", &few_rows_linear_cpu);
}

}  // namespace
}  // namespace rwkv::ops
