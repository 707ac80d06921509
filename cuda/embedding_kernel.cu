// Rows of a table, and the table's gradient without atomics. Source: model/ops/embedding.h.
//   y_n = weight[token_n]          dweight[v] = sum over n with token_n = v of dy_n
//
// Launch shape, forward: a block of 128 threads copies 128 vectors of 16 bytes of four rows, all in
// flight at once (elements, where rows are not aligned).
// Backward: the positions come sorted by token, so a token's rows are a run. Sorted positions are
// cut into pieces of 32, whatever the runs: a block adds one piece's rows for its columns, eight
// loads in flight, and writes each run that lies within the piece to its place. A run that a cut
// goes through leaves a partial sum in fp32: a piece has at most two, of the run that began before
// it (slot 0) and of the one that goes on behind it (slot 1). A second kernel adds a run's partial
// sums in order. So a token that is a tenth of all rows takes no longer than others; 32 rows cost
// 2 partial rows at most, an eighth of the bytes of bf16 rows, and give N = 16384 512 pieces.
// Rows of the table that have no token are zero: a memset of all comes first, the rows with a token
// are written twice.
// Floor: forward, 4 bytes an element of [N, C] in bf16; backward, 2 bytes an element of [N, C] and
// 2 an element of [V, C]. N = 16384, V = 50304, C = 768: 50 MB, 17 us; 102 MB, 35 us at 2.93 TB/s.
#include <cuda_bf16.h>

#include "cuda/embedding_kernel.h"
#include "cuda/launch.h"
#include "cuda/packed.cuh"

namespace rwkv {
namespace {

constexpr int kThreads = 128;
constexpr int kForwardRows = 4;
constexpr int64_t kPiece = 32;
constexpr int kInFlight = 8;
// That share a multiprocessor, so that 512 pieces of 768 columns run at once on 132 of them: 94
// registers of the 102 that this leaves; six blocks would spill.
constexpr int kBackwardBlocks = 5;

// The first of this thread's columns.
template <int kWidth>
__device__ __forceinline__ int64_t own_column() {
  return (static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x) * kWidth;
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const Element* __restrict__ weight,
                                                             const int64_t* __restrict__ tokens,
                                                             Element* __restrict__ out,
                                                             int64_t N,
                                                             int64_t V,
                                                             int64_t C) {
  const int64_t column = own_column<kWidth>();
  if (column >= C) {
    return;
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kForwardRows;
  Packed<Element, kWidth> rows[kForwardRows];
#pragma unroll
  for (int i = 0; i < kForwardRows; ++i) {
    const int64_t token = first + i < N ? tokens[first + i] : -1;
    if (token >= 0 && token < V) {
      rows[i] = load_packed<kWidth>(weight + token * C + column);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        rows[i].x[j] = from_float<Element>(__uint_as_float(0x7fffffffu));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kForwardRows; ++i) {
    if (first + i < N) {
      store_packed(out + (first + i) * C + column, rows[i]);
    }
  }
}

// Sums over rows, of this thread's columns.
template <int kWidth>
struct ColumnSums {
  static constexpr int kFloats = kWidth < 4 ? kWidth : 4;  // of one access
  float x[kWidth] = {};

  template <typename Element>
  __device__ __forceinline__ void add(const Packed<Element, kWidth>& row) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x[i] += to_float(row.x[i]);
    }
  }
  __device__ __forceinline__ void add_partial(const float* from) {
#pragma unroll
    for (int i = 0; i < kWidth; i += kFloats) {
      const auto packed = load_packed<kFloats>(from + i);
#pragma unroll
      for (int j = 0; j < kFloats; ++j) {
        x[i + j] += packed.x[j];
      }
    }
  }
  __device__ __forceinline__ void store_partial(float* to) const {
#pragma unroll
    for (int i = 0; i < kWidth; i += kFloats) {
      Packed<float, kFloats> packed;
#pragma unroll
      for (int j = 0; j < kFloats; ++j) {
        packed.x[j] = x[i + j];
      }
      store_packed(to + i, packed);
    }
  }
  template <typename Element>
  __device__ __forceinline__ void store(Element* to) const {
    Packed<Element, kWidth> packed;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      packed.x[i] = from_float<Element>(x[i]);
    }
    store_packed(to, packed);
  }
};

// Where piece `piece` leaves the partial sum of the run that began before it (slot 0) or goes on
// behind it (slot 1).
__device__ __forceinline__ int64_t partial_row(int64_t piece, int slot) {
  return 2 * piece + slot;
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    embedding_backward_kernel(const Element* __restrict__ dy,
                              const int64_t* __restrict__ sorted_tokens,
                              const int64_t* __restrict__ order,
                              Element* __restrict__ dweight,
                              float* __restrict__ partials,
                              int64_t N,
                              int64_t V,
                              int64_t C) {
  const int64_t column = own_column<kWidth>();
  if (column >= C) {
    return;
  }
  const int64_t piece = blockIdx.x;
  const int64_t begin = piece * kPiece;
  const int64_t end = begin + kPiece < N ? begin + kPiece : N;
  bool began_before = begin > 0 && sorted_tokens[begin - 1] == sorted_tokens[begin];
  ColumnSums<kWidth> sums;
  for (int64_t first = begin; first < end; first += kInFlight) {
    Packed<Element, kWidth> rows[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i < end) {
        rows[i] = load_packed<kWidth>(dy + order[first + i] * C + column);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t next = first + i + 1;
      if (next > end) {
        break;
      }
      sums.add(rows[i]);
      const int64_t token = sorted_tokens[next - 1];
      const bool run_ends = next == N || sorted_tokens[next] != token;
      if (!run_ends && next < end) {
        continue;
      }
      if (began_before || !run_ends) {
        const int64_t row = partial_row(piece, began_before ? 0 : 1);
        sums.store_partial(partials + row * C + column);
      } else if (token >= 0 && token < V) {
        sums.store(dweight + token * C + column);
      }
      sums = {};
      began_before = false;
    }
  }
}

// A block for each piece; it has work if a run begins in the piece and goes on behind it.
template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads)
    add_partials_kernel(const float* __restrict__ partials,
                        const int64_t* __restrict__ sorted_tokens,
                        Element* __restrict__ dweight,
                        int64_t N,
                        int64_t V,
                        int64_t C) {
  const int64_t column = own_column<kWidth>();
  const int64_t piece = blockIdx.x;
  const int64_t begin = piece * kPiece;
  const int64_t end = begin + kPiece;
  if (column >= C || end >= N) {
    return;
  }
  const int64_t token = sorted_tokens[end - 1];
  const bool began_before =
      begin > 0 && sorted_tokens[begin - 1] == token && sorted_tokens[begin] == token;
  if (sorted_tokens[end] != token || began_before || token < 0 || token >= V) {
    return;
  }
  // The run's last piece is the last that begins with the token: between `last`, which does, and
  // `behind`.
  int64_t last = piece + 1;
  int64_t behind = ceil_div(N, kPiece);
  while (behind - last > 1) {
    const int64_t middle = last + (behind - last) / 2;
    if (sorted_tokens[middle * kPiece] == token) {
      last = middle;
    } else {
      behind = middle;
    }
  }
  ColumnSums<kWidth> sums;
  sums.add_partial(partials + partial_row(piece, 1) * C + column);
#pragma unroll 4
  for (int64_t i = piece + 1; i <= last; ++i) {
    sums.add_partial(partials + partial_row(i, 0) * C + column);
  }
  sums.store(dweight + token * C + column);
}

template <int kWidth>
LaunchShape shape_of(int64_t blocks, int64_t C) {
  return {.grid = dim3(static_cast<unsigned>(blocks),
                       static_cast<unsigned>(ceil_div(C, int64_t{kThreads} * kWidth))),
          .block = dim3(kThreads)};
}

template <typename Element, int kWidth>
cudaError_t launch_forward(const EmbeddingForward<Element>& a, cudaStream_t stream) {
  return launch_kernel(&embedding_kernel<Element, kWidth>,
                       shape_of<kWidth>(ceil_div(a.N, kForwardRows), a.C),
                       stream,
                       a.weight,
                       a.tokens,
                       a.out,
                       a.N,
                       a.V,
                       a.C);
}

template <typename Element, int kWidth>
cudaError_t launch_backward(const EmbeddingBackward<Element>& a, cudaStream_t stream) {
  const LaunchShape shape = shape_of<kWidth>(ceil_div(a.N, kPiece), a.C);
  const cudaError_t error = launch_kernel(&embedding_backward_kernel<Element, kWidth>,
                                          shape,
                                          stream,
                                          a.dy,
                                          a.sorted_tokens,
                                          a.order,
                                          a.dweight,
                                          a.scratch,
                                          a.N,
                                          a.V,
                                          a.C);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_kernel(&add_partials_kernel<Element, kWidth>,
                       shape,
                       stream,
                       a.scratch,
                       a.sorted_tokens,
                       a.dweight,
                       a.N,
                       a.V,
                       a.C);
}

}  // namespace

template <typename Element>
cudaError_t launch_embedding(const EmbeddingForward<Element>& arguments, cudaStream_t stream) {
  const auto& a = arguments;
  if (a.N == 0 || a.C == 0) {
    return cudaSuccess;
  }
  const bool aligned =
      a.C % kPackedWidth<Element> == 0 && is_aligned(a.weight, 16) && is_aligned(a.out, 16);
  return aligned ? launch_forward<Element, kPackedWidth<Element>>(a, stream)
                 : launch_forward<Element, 1>(a, stream);
}

int64_t embedding_backward_scratch_size(int64_t N, int64_t C) {
  return 2 * ceil_div(N, kPiece) * C;
}

template <typename Element>
cudaError_t launch_embedding_backward(const EmbeddingBackward<Element>& arguments,
                                      cudaStream_t stream) {
  const auto& a = arguments;
  if (a.V == 0 || a.C == 0) {
    return cudaSuccess;
  }
  // +0 in every format.
  const cudaError_t error =
      cudaMemsetAsync(a.dweight, 0, static_cast<size_t>(a.V * a.C) * sizeof(Element), stream);
  if (error != cudaSuccess || a.N == 0) {
    return error;
  }
  const bool aligned = a.C % kPackedWidth<Element> == 0 && is_aligned(a.dy, 16) &&
                       is_aligned(a.dweight, 16) && is_aligned(a.scratch, 16);
  return aligned ? launch_backward<Element, kPackedWidth<Element>>(a, stream)
                 : launch_backward<Element, 1>(a, stream);
}

#define RWKV_INSTANTIATE(Element)                                                        \
  template cudaError_t launch_embedding(const EmbeddingForward<Element>&, cudaStream_t); \
  template cudaError_t launch_embedding_backward(const EmbeddingBackward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
