// Neighbouring elements as one load or store, and sums of doubles over a warp and a block.
#pragma once

#include <cstdint>

#include "cuda/vector_io.cuh"

namespace rwkv {

// kWidth neighbours as they lie in memory: one access of up to 16 bytes, which must be aligned to
// its size. A width of 1 is an element of a row that is not aligned.
template <typename Element, int kWidth>
struct alignas(sizeof(Element) * kWidth) Packed {
  static_assert(sizeof(Element) * kWidth <= 16, "the longest load is one of 16 bytes");
  Element x[kWidth];
};

// Elements of a 16-byte access.
template <typename Element>
constexpr int kPackedWidth = 16 / static_cast<int>(sizeof(Element));

template <int kWidth, typename Element>
__device__ __forceinline__ Packed<Element, kWidth> load_packed(const Element* from) {
  return *reinterpret_cast<const Packed<Element, kWidth>*>(from);
}
template <typename Element, int kWidth>
__device__ __forceinline__ void store_packed(Element* to, const Packed<Element, kWidth>& value) {
  *reinterpret_cast<Packed<Element, kWidth>*>(to) = value;
}

// Whether accesses of `bytes` at this address are aligned.
inline bool is_aligned(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(bytes) == 0;
}

// Sum over the lanes of a whole warp, the same bits in every lane.
__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

// Sum over a block of kWarps whole warps, the same bits in every thread; `sums` is shared memory
// for one number a warp. A barrier comes between its writes and reads, none after.
template <int kWarps>
__device__ __forceinline__ double block_sum(double x, double* sums) {
  x = warp_sum(x);
  const int lane = static_cast<int>(threadIdx.x % kWarpSize);
  if (lane == 0) {
    sums[threadIdx.x / kWarpSize] = x;
  }
  __syncthreads();
  return warp_sum(lane < kWarps ? sums[lane] : 0.0);
}

}  // namespace rwkv
