// What the CPU kernels of recurrences over a matrix a head share: sizes, and scratch memory in
// which a head's channels are rows of whole vectors. Everything here is for model/ops/*_cpu.cpp.
#pragma once

#include <cstdint>

#include <ATen/ATen.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/tensor_data.h"

namespace rwkv::ops {

// r_BTC's, and the tokens from one saved state to the next.
struct HeadSizes {
  int64_t batch_size, seq_len, num_heads, head_size, chunk_len;
  int64_t n_embd() const { return num_heads * head_size; }
  int64_t num_chunks() const { return (seq_len + chunk_len - 1) / chunk_len; }
};
inline HeadSizes head_sizes_of(const at::Tensor& r_BTC, int64_t num_heads, int64_t chunk_len) {
  return {.batch_size = r_BTC.size(0),
          .seq_len = r_BTC.size(1),
          .num_heads = num_heads,
          .head_size = r_BTC.size(2) / num_heads,
          .chunk_len = chunk_len};
}

// A row of a head in scratch memory is whole vectors, of any instruction set: 64 bytes.
template <typename Scalar>
int64_t padded(int64_t head_size) {
  constexpr auto kLine = static_cast<int64_t>(64 / sizeof(Scalar));
  return (head_size + kLine - 1) / kLine * kLine;
}

// Scratch memory of a thread, handed out in rows of one padded size, all zero.
template <typename Scalar>
class Scratch {
 public:
  Scratch(int64_t num_rows, int64_t row_size)
      : memory_(at::zeros({num_rows * row_size}, c10::CppTypeToScalarType<Scalar>::value)),
        row_size_(row_size) {}
  Scalar* rows(int64_t count) {
    Scalar* const result = memory_.mutable_data_ptr<Scalar>() + used_ * row_size_;
    used_ += count;
    return result;
  }

 private:
  at::Tensor memory_;
  int64_t row_size_;
  int64_t used_ = 0;
};

// A head's channels of a token, as numbers; the padding stays zero.
template <typename Vector, typename Element>
RWKV_INLINE void load_row(LaneOf<Vector>* to, const Element* from, int64_t head_size) {
  for_each_vector<Vector>(head_size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(to + c, load_lanes<Vector>(from + c, count));
  });
}
template <typename Vector, typename Element>
RWKV_INLINE void store_row(Element* to, const LaneOf<Vector>* from, int64_t head_size) {
  for_each_vector<Vector>(head_size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(to + c, load_lanes<Vector>(from + c), count);
  });
}

// Between a dense [N, N] and rows of padded size, as it is or transposed.
template <typename Vector, typename Scalar>
RWKV_INLINE void load_matrix(Scalar* to, const Scalar* from, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    load_row<Vector>(to + i * stride, from + i * size, size);
  }
}
template <typename Vector, typename Scalar>
RWKV_INLINE void store_matrix(Scalar* to, const Scalar* from, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    store_row<Vector>(to + i * size, from + i * stride, size);
  }
}
template <typename Scalar>
RWKV_INLINE void load_transposed(Scalar* to, const Scalar* from, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      to[j * stride + i] = from[i * size + j];
    }
  }
}

}  // namespace rwkv::ops
