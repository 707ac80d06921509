// Cross entropy over rows of padded logits, its gradient over the logits, and the sum of losses.
// Source: model/ops/cross_entropy.h.
//   forward   loss = max + log s - l_target,  s = sum_v e^{l_v - max}
//   backward  l_v <- scale (e^{l_v - max} / s - [v = target] + l2wrap max [v = argmax])
// All of it is fp32; exponentials are of differences to the maximum, in base 2.
//
// Launch shape: one block of 512 threads a row; a thread takes every 512th vector of 16 bytes (of
// one element, where rows are not aligned), four of them in flight. It carries a maximum and a sum
// relative to it (Milakov and Gimelshein, arXiv:1805.02867), so a row is read from memory once. The
// gradient needs it again: the row's beginning waits in shared memory, as much of it as lets two
// blocks share a multiprocessor (113 KiB of 227 on sm_90, so all 50,304 columns of bf16; 81 KiB on
// sm_80, 49 KiB on sm_86 and 89), so that one block's loads overlap the other's stores. What does
// not fit is read again, from L2, where the rows in progress still are. A thread reads back only
// what it wrote, so the memory needs no barrier. 64 registers in bf16, the most that two blocks
// leave.
// Floor: 4 bytes a logit in bf16, 8 in fp32 (2 and 4 without the gradient). At N = 16384,
// V = 50304, bf16: 3.3 GB, 1.13 ms at 2.93 TB/s; two exponentials a logit take 0.44 ms of the
// special-function units and overlap.
//
// fmaxf passes over a NaN, so the maximum never shows one; the sum does, for e^NaN is NaN, and what
// is derived from the sum then is NaN, too. The maximum begins at the lowest finite number rather
// than -inf, for -inf - -inf would be NaN for a thread that meets masked logits alone.
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>

#include "cuda/cross_entropy_kernel.h"
#include "cuda/launch.h"
#include "cuda/packed.cuh"

namespace rwkv {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
// 32 KiB a block in flight: two blocks cover the latency of memory, about 16 KiB a multiprocessor,
// even while one of them stores.
constexpr int kInFlight = 4;
constexpr float kLog2E = 1.44269504f;

__device__ __forceinline__ float nan_value() {
  return __uint_as_float(0x7fffffffu);
}
// e^(x - max); zero for x = -inf.
__device__ __forceinline__ float exp_below(float x, float max) {
  return fast_exp2((x - max) * kLog2E);
}

// The largest logit of some vectors, the first of those that holds it, and the sum of
// e^{l - max}.
struct Statistics {
  float max;
  float sum;
  int max_vector;
};

// At the start of shared memory; the row's vectors follow.
struct SharedStatistics {
  Statistics warps[kWarps];
};
constexpr size_t kSharedHeader = 256;
static_assert(sizeof(SharedStatistics) <= kSharedHeader);

// Over the lanes of a warp; lanes that have nothing hold {-FLT_MAX, 0, INT_MAX}.
__device__ __forceinline__ Statistics warp_statistics(const Statistics& own) {
  float max = own.max;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
  }
  int max_vector = own.max == max ? own.max_vector : INT_MAX;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(kAllLanes, max_vector, distance);
    max_vector = other < max_vector ? other : max_vector;
  }
  return {max, warp_sum(own.sum * exp_below(own.max, max)), max_vector};
}

// Over the block; the same in every thread.
__device__ __forceinline__ Statistics block_statistics(const Statistics& own,
                                                       SharedStatistics& shared) {
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  const Statistics warp = warp_statistics(own);
  if (lane == 0) {
    shared.warps[threadIdx.x / kWarpSize] = warp;
  }
  __syncthreads();
  return warp_statistics(lane < kWarps ? shared.warps[lane] : Statistics{-FLT_MAX, 0.0f, INT_MAX});
}

// The logits of a vector as numbers; -inf from column V on.
template <typename Element, int kWidth>
__device__ __forceinline__ void unpack(const Packed<Element, kWidth>& packed,
                                       int vector,
                                       int V,
                                       float (&x)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x[i] = to_float(packed.x[i]);
  }
  const int columns = V - vector * kWidth;
  if (columns < kWidth) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x[i] = i < columns ? x[i] : -INFINITY;
    }
  }
}

template <int kWidth>
__device__ __forceinline__ void add_vector(const float (&x)[kWidth],
                                           int vector,
                                           Statistics& statistics) {
  float max = x[0];
#pragma unroll
  for (int i = 1; i < kWidth; ++i) {
    max = fmaxf(max, x[i]);
  }
  if (max > statistics.max) {
    statistics.sum *= exp_below(statistics.max, max);
    statistics.max = max;
    statistics.max_vector = vector;
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    statistics.sum += exp_below(x[i], statistics.max);
  }
}

// The statistics of the row's columns before V; its first `kept` vectors go to `copy`, too.
template <typename Element, int kWidth>
__device__ __forceinline__ Statistics read_row(
    const Element* row, int V, Packed<Element, kWidth>* copy, int kept, SharedStatistics& shared) {
  Statistics own{-FLT_MAX, 0.0f, INT_MAX};
  const int vectors = (V - 1) / kWidth + 1;
  // A vector's number stays below 2^31: V does, and a stride is added only to a smaller number.
  for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kInFlight) {
    Packed<Element, kWidth> packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < vectors) {
        packed[i] = load_packed<kWidth>(row + (first + i * kThreads) * kWidth);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < vectors) {
        const int vector = static_cast<int>(first) + i * kThreads;
        if (vector < kept) {
          copy[vector] = packed[i];
        }
        float x[kWidth];
        unpack(packed[i], vector, V, x);
        add_vector(x, vector, own);
      }
    }
  }
  return block_statistics(own, shared);
}

__device__ __forceinline__ float loss_of(const Statistics& row, float target_logit) {
  return logf(row.sum) + (row.max - target_logit);
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const Element* __restrict__ logits,
                                                                 const int64_t* targets,
                                                                 float* losses,
                                                                 int V,
                                                                 int V_padded) {
  SharedStatistics& shared = *static_cast<SharedStatistics*>(shared_memory());
  const Element* row = logits + static_cast<int64_t>(blockIdx.x) * V_padded;
  const Statistics statistics =
      read_row(row, V, static_cast<Packed<Element, kWidth>*>(nullptr), 0, shared);
  if (threadIdx.x == 0) {
    const int64_t target = targets[blockIdx.x];
    const bool valid = target >= 0 && target < V;
    losses[blockIdx.x] = valid ? loss_of(statistics, to_float(row[target])) : nan_value();
  }
}

// The gradient's vector, in place of the logits x.
struct RowGradient {
  float max;
  float factor;  // scale / s
  float scale;
  float penalty;  // scale l2wrap max
  int target;
  int max_vector;

  template <int kWidth>
  __device__ __forceinline__ void apply(int vector, float (&x)[kWidth]) const {
    // The first of the vector's places that has the maximum, if the vector is the first.
    int max_place = kWidth;
    if (vector == max_vector) {
#pragma unroll
      for (int i = kWidth - 1; i >= 0; --i) {
        max_place = x[i] == max ? i : max_place;
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      x[i] = exp_below(x[i], max) * factor;
    }
    const int target_place = target - vector * kWidth;
    if (max_place < kWidth || (target_place >= 0 && target_place < kWidth)) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        // In this order: a target that is nearly certain leaves little, which the penalty must not
        // round.
        x[i] -= i == target_place ? scale : 0.0f;
        x[i] += i == max_place ? penalty : 0.0f;
      }
    }
  }
};

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_gradient_kernel(Element* logits,
                                                                             const int64_t* targets,
                                                                             float* losses,
                                                                             int V,
                                                                             int V_padded,
                                                                             int kept,
                                                                             float l2wrap,
                                                                             float scale) {
  using Vector = Packed<Element, kWidth>;
  SharedStatistics& shared = *static_cast<SharedStatistics*>(shared_memory());
  Vector* copy =
      reinterpret_cast<Vector*>(static_cast<unsigned char*>(shared_memory()) + kSharedHeader);
  Element* row = logits + static_cast<int64_t>(blockIdx.x) * V_padded;
  const int64_t target = targets[blockIdx.x];
  const bool valid = target >= 0 && target < V;
  // Before the barrier of read_row, behind which logits are overwritten.
  const float target_logit = valid ? to_float(row[target]) : nan_value();

  const Statistics statistics = read_row(row, V, copy, kept, shared);
  if (threadIdx.x == 0) {
    losses[blockIdx.x] = loss_of(statistics, target_logit);
  }

  const RowGradient gradient{.max = statistics.max,
                             .factor = valid ? scale / statistics.sum : nan_value(),
                             .scale = scale,
                             .penalty = scale * l2wrap * statistics.max,
                             .target = valid ? static_cast<int>(target) : -1,
                             .max_vector = statistics.max_vector};
  const int vectors = (V - 1) / kWidth + 1;
  const int padded_vectors = V_padded / kWidth;
  for (int64_t first = threadIdx.x; first < padded_vectors; first += kThreads * kInFlight) {
    Vector packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t vector = first + i * kThreads;
      if (vector < vectors) {
        packed[i] = vector < kept ? copy[vector] : load_packed<kWidth>(row + vector * kWidth);
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * kThreads < padded_vectors) {
        const int vector = static_cast<int>(first) + i * kThreads;
        float x[kWidth] = {};
        if (vector < vectors) {
          unpack(packed[i], vector, V, x);
          gradient.apply(vector, x);
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
          // Beside zero: a factor of NaN reaches the columns of V's own vector.
          packed[i].x[j] = from_float<Element>(vector * kWidth + j < V ? x[j] : 0.0f);
        }
        store_packed(row + static_cast<int64_t>(vector) * kWidth, packed[i]);
      }
    }
  }
}

// The dynamic shared memory of a block of which two share a multiprocessor.
cudaError_t shared_bytes_of_half(int64_t* bytes) {
  int device = 0, total = 0, reserved = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&total, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device);
  }
  *bytes = total / 2 - reserved;
  return error;
}

template <typename Element>
bool has_aligned_rows(const Element* logits, int64_t V_padded) {
  return V_padded % kPackedWidth<Element> == 0 && is_aligned(logits, 16);
}
bool are_sizes_valid(int64_t V, int64_t V_padded) {
  return V >= 1 && V <= V_padded && V_padded <= INT_MAX;
}

template <typename Element, int kWidth>
cudaError_t launch_gradient(Element* logits,
                            const int64_t* targets,
                            float* losses,
                            int64_t N,
                            int64_t V,
                            int64_t V_padded,
                            float l2wrap,
                            float scale,
                            cudaStream_t stream) {
  int64_t shared_bytes = 0;
  const cudaError_t error = shared_bytes_of_half(&shared_bytes);
  if (error != cudaSuccess) {
    return error;
  }
  constexpr int64_t kVectorBytes = sizeof(Packed<Element, kWidth>);
  const int64_t fitting = (shared_bytes - static_cast<int64_t>(kSharedHeader)) / kVectorBytes;
  const int64_t kept = std::min(ceil_div(V, kWidth), fitting);
  return launch_kernel(&cross_entropy_gradient_kernel<Element, kWidth>,
                       {.grid = dim3(static_cast<unsigned>(N)),
                        .block = dim3(kThreads),
                        .shared_bytes = kSharedHeader + static_cast<size_t>(kept * kVectorBytes)},
                       stream,
                       logits,
                       targets,
                       losses,
                       static_cast<int>(V),
                       static_cast<int>(V_padded),
                       static_cast<int>(kept),
                       l2wrap,
                       scale);
}

}  // namespace

template <typename Element>
cudaError_t launch_cross_entropy(const Element* logits,
                                 const int64_t* targets,
                                 float* losses,
                                 int64_t N,
                                 int64_t V,
                                 int64_t V_padded,
                                 cudaStream_t stream) {
  if (N == 0) {
    return cudaSuccess;
  }
  if (!are_sizes_valid(V, V_padded)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = has_aligned_rows(logits, V_padded)
                          ? &cross_entropy_kernel<Element, kPackedWidth<Element>>
                          : &cross_entropy_kernel<Element, 1>;
  return launch_kernel(kernel,
                       {.grid = dim3(static_cast<unsigned>(N)),
                        .block = dim3(kThreads),
                        .shared_bytes = kSharedHeader},
                       stream,
                       logits,
                       targets,
                       losses,
                       static_cast<int>(V),
                       static_cast<int>(V_padded));
}

template <typename Element>
cudaError_t launch_cross_entropy_gradient(Element* logits,
                                          const int64_t* targets,
                                          float* losses,
                                          int64_t N,
                                          int64_t V,
                                          int64_t V_padded,
                                          float l2wrap,
                                          float scale,
                                          cudaStream_t stream) {
  if (N == 0) {
    return cudaSuccess;
  }
  if (!are_sizes_valid(V, V_padded)) {
    return cudaErrorInvalidValue;
  }
  const auto launch = has_aligned_rows(logits, V_padded)
                          ? &launch_gradient<Element, kPackedWidth<Element>>
                          : &launch_gradient<Element, 1>;
  return launch(logits, targets, losses, N, V, V_padded, l2wrap, scale, stream);
}

#define RWKV_INSTANTIATE(Element)                                                       \
  template cudaError_t launch_cross_entropy(                                            \
      const Element*, const int64_t*, float*, int64_t, int64_t, int64_t, cudaStream_t); \
  template cudaError_t launch_cross_entropy_gradient(                                   \
      Element*, const int64_t*, float*, int64_t, int64_t, int64_t, float, float, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
