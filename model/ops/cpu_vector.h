// Vectors for the CPU kernels: 16 floats (or 8 doubles) that g++ maps to whatever registers the
// function it inlines into is compiled for. A kernel is one function marked RWKV_CPU_CLONES, which
// is compiled for AVX-512, for AVX2 and for any x86-64, and chosen when the program starts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// x86-64-v4 is AVX-512, v3 is AVX2 with FMA.
#define RWKV_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RWKV_INLINE inline __attribute__((always_inline))

namespace rwkv::ops {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16x32 __attribute__((vector_size(64)));
typedef uint16_t Bits16 __attribute__((vector_size(32)));
typedef uint32_t Uint16x32 __attribute__((vector_size(64)));
typedef double Double8 __attribute__((vector_size(64)));

// A bf16 number in memory: the top half of a float.
struct Bf16 {
  uint16_t bits;
};

// The vector that computes for elements of a type in memory, and its number of lanes.
template <typename Element>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Vector = Float16;
  using Scalar = float;
  static constexpr int64_t kLanes = 16;
};
template <>
struct VectorOf<Bf16> {
  using Vector = Float16;
  using Scalar = float;
  static constexpr int64_t kLanes = 16;
};
template <>
struct VectorOf<double> {
  using Vector = Double8;
  using Scalar = double;
  static constexpr int64_t kLanes = 8;
};

RWKV_INLINE Float16 load_lanes(const float* from) {
  Float16 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
RWKV_INLINE Double8 load_lanes(const double* from) {
  Double8 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
RWKV_INLINE Float16 load_lanes(const Bf16* from) {
  Bits16 bits;
  std::memcpy(&bits, from, sizeof bits);
  const Uint16x32 wide = __builtin_convertvector(bits, Uint16x32) << 16;
  Float16 x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

RWKV_INLINE void store_lanes(float* to, Float16 x) {
  std::memcpy(to, &x, sizeof x);
}
RWKV_INLINE void store_lanes(double* to, Double8 x) {
  std::memcpy(to, &x, sizeof x);
}
// Rounds to nearest even; a NaN stays one (its quiet bit is set, or rounding could make it inf).
RWKV_INLINE void store_lanes(Bf16* to, Float16 x) {
  Uint16x32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Uint16x32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Uint16x32 quiet = (bits >> 16) | 0x40;
  const Bits16 narrow = __builtin_convertvector(x == x ? rounded : quiet, Bits16);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The same for the first `count` lanes of a row's last, partial vector. The other lanes read zero.
template <typename Element>
RWKV_INLINE typename VectorOf<Element>::Vector load_lanes(const Element* from, int64_t count) {
  constexpr int64_t kLanes = VectorOf<Element>::kLanes;
  if (count == kLanes) {
    return load_lanes(from);
  }
  Element padded[kLanes] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Element));
  return load_lanes(padded);
}
template <typename Element>
RWKV_INLINE void store_lanes(Element* to, typename VectorOf<Element>::Vector x, int64_t count) {
  constexpr int64_t kLanes = VectorOf<Element>::kLanes;
  if (count == kLanes) {
    store_lanes(to, x);
    return;
  }
  Element padded[kLanes];
  store_lanes(padded, x);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(Element));
}

RWKV_INLINE Float16 max_lanes(Float16 x, Float16 y) {
  return x > y ? x : y;
}
RWKV_INLINE Double8 max_lanes(Double8 x, Double8 y) {
  return x > y ? x : y;
}

// e^x for x <= 0; zero below the smallest normal float. Error under 2 units in the last place:
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 split in two, so that r is exact to a float's
// precision), a polynomial for e^r, and n added to the exponent.
RWKV_INLINE Float16 exp_lanes(Float16 x) {
  constexpr float kSmallest = -87.33654f;
  const Float16 clamped = x > kSmallest ? x : Float16{} + kSmallest;
  // Adding and taking off 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kRound = 12582912.0f;
  const Float16 n = (clamped * 1.44269504f + kRound) - kRound;
  const Float16 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float16 poly = Float16{} + 1.0f / 5040;
  poly = poly * r + 1.0f / 720;
  poly = poly * r + 1.0f / 120;
  poly = poly * r + 1.0f / 24;
  poly = poly * r + 1.0f / 6;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  const Int16x32 exponent = (__builtin_convertvector(n, Int16x32) + 127) << 23;
  Float16 power;
  std::memcpy(&power, &exponent, sizeof power);
  const Float16 result = poly * power;
  // A NaN fails every comparison, and so falls through to itself.
  return x > kSmallest ? result : (x <= kSmallest ? Float16{} : x);
}

// Only the tests' float64 comparisons come here.
RWKV_INLINE Double8 exp_lanes(Double8 x) {
  Double8 result;
  for (int lane = 0; lane < 8; ++lane) {
    result[lane] = std::exp(x[lane]);
  }
  return result;
}

}  // namespace rwkv::ops
