// 16-byte loads and stores of bf16 and fp32 rows as fp32 numbers, and sums over a warp and a block.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/intrinsics.cuh"

namespace rwkv {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
// Rounds to nearest even.
template <typename Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Eight bf16 numbers from their words.
__device__ __forceinline__ void unpack_words(const uint32_t (&words)[4], float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // A bf16 number is the top half of a float.
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

// Eight neighbouring elements; the address must be 16-byte aligned (32 bytes are two loads).
__device__ __forceinline__ void load8(const float* from, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}
__device__ __forceinline__ void load8(const __nv_bfloat16* from, float (&x)[8]) {
  const uint4 packed = *reinterpret_cast<const uint4*>(from);
  unpack_words({packed.x, packed.y, packed.z, packed.w}, x);
}
__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store8(__nv_bfloat16* to, const float (&x)[8]) {
  __nv_bfloat162 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  }
  uint4 packed;
  memcpy(&packed, pairs, sizeof packed);
  *reinterpret_cast<uint4*>(to) = packed;
}

// The same for the first `count` of them, one by one and without alignment; the others read zero.
template <typename Element>
__device__ __forceinline__ void load_first(const Element* from, int64_t count, float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    x[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}
template <typename Element>
__device__ __forceinline__ void store_first(Element* to, int64_t count, const float (&x)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) {
      to[i] = from_float<Element>(x[i]);
    }
  }
}

// Sum over the lanes of a whole warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
}

}  // namespace rwkv
