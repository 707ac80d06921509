// Neighbouring elements as one load or store, and sums of doubles over a warp and a block.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/vector_io.cuh"

namespace rwkv {

// kWidth neighbours as they lie in memory: one access of up to 16 bytes, or two of 16, aligned to
// its size. A width of 1 is an element of a row that is not aligned.
template <typename Element, int kWidth>
struct alignas(sizeof(Element) * kWidth < 16 ? sizeof(Element) * kWidth : 16) Packed {
  static_assert(sizeof(Element) * kWidth <= 32, "the longest load is two of 16 bytes");
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

// Eight neighbours that wait in registers to be unpacked. bf16 ones stay in their words: halves of
// registers nvcc would take apart and put together again.
template <typename Element>
using Packed8 = Packed<std::conditional_t<std::is_same_v<Element, float>, float, uint32_t>,
                       2 * static_cast<int>(sizeof(Element))>;
template <typename Element>
__device__ __forceinline__ Packed8<Element> load_packed8(const Element* from) {
  return *reinterpret_cast<const Packed8<Element>*>(from);
}
__device__ __forceinline__ void unpack(const Packed8<float>& packed, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = packed.x[i];
  }
}
__device__ __forceinline__ void unpack(const Packed8<__nv_bfloat16>& packed, float (&x)[8]) {
  unpack_words(packed.x, x);
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
