// Vectors for the CPU kernels: 8 floats or 4 doubles, a register of AVX2. (With 16 floats g++ 12
// compares and selects one element after another wherever there is no AVX-512.) A kernel is one
// function marked RWKV_CPU_CLONES, which is compiled for AVX-512, for AVX2 and for any x86-64, and
// chosen when the program starts.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// x86-64-v4 is AVX-512, v3 is AVX2 with FMA.
#define RWKV_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define RWKV_INLINE inline __attribute__((always_inline))
// For the lambdas in a kernel: [&](int64_t i) RWKV_INLINE_LAMBDA { ... }.
#define RWKV_INLINE_LAMBDA __attribute__((always_inline))

namespace rwkv::ops {

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8x32 __attribute__((vector_size(32)));
typedef uint16_t Bits8 __attribute__((vector_size(16)));
typedef uint32_t Uint8x32 __attribute__((vector_size(32)));
typedef double Double4 __attribute__((vector_size(32)));
typedef int64_t Int4x64 __attribute__((vector_size(32)));

// A bf16 number in memory: the top half of a float.
struct Bf16 {
  uint16_t bits;
};

// The vector that computes for elements of a type in memory, and its number of lanes.
template <typename Element>
struct VectorOf;
template <>
struct VectorOf<float> {
  using Vector = Float8;
  using Scalar = float;
  static constexpr int64_t kLanes = 8;
};
template <>
struct VectorOf<Bf16> {
  using Vector = Float8;
  using Scalar = float;
  static constexpr int64_t kLanes = 8;
};
template <>
struct VectorOf<double> {
  using Vector = Double4;
  using Scalar = double;
  static constexpr int64_t kLanes = 4;
};

RWKV_INLINE Float8 load_lanes(const float* from) {
  Float8 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
RWKV_INLINE Double4 load_lanes(const double* from) {
  Double4 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
RWKV_INLINE Float8 load_lanes(const Bf16* from) {
  Bits8 bits;
  std::memcpy(&bits, from, sizeof bits);
  const Uint8x32 wide = __builtin_convertvector(bits, Uint8x32) << 16;
  Float8 x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

RWKV_INLINE void store_lanes(float* to, Float8 x) {
  std::memcpy(to, &x, sizeof x);
}
RWKV_INLINE void store_lanes(double* to, Double4 x) {
  std::memcpy(to, &x, sizeof x);
}
// Rounds to nearest even; a NaN stays one (its quiet bit is set, or rounding could make it inf).
RWKV_INLINE void store_lanes(Bf16* to, Float8 x) {
  Uint8x32 bits;
  std::memcpy(&bits, &x, sizeof bits);
  const Uint8x32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Uint8x32 quiet = (bits >> 16) | 0x40;
  const Bits8 narrow = __builtin_convertvector(x == x ? rounded : quiet, Bits8);
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

// Calls `work(first, count)` for each vector of a row: the count is a constant but for the last.
template <typename Element, typename Work>
RWKV_INLINE void for_each_vector(int64_t size, const Work& work) {
  constexpr int64_t kLanes = VectorOf<Element>::kLanes;
  int64_t first = 0;
  for (; first + kLanes <= size; first += kLanes) {
    work(first, kLanes);
  }
  if (first < size) {
    work(first, size - first);
  }
}

// Zero in all but the first `count` lanes.
RWKV_INLINE Float8 first_lanes(Float8 x, int64_t count) {
  const Int8x32 lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return lane < static_cast<int32_t>(count) ? x : Float8{};
}
RWKV_INLINE Double4 first_lanes(Double4 x, int64_t count) {
  const Int4x64 lane = {0, 1, 2, 3};
  return lane < count ? x : Double4{};
}

RWKV_INLINE float sum_of_lanes(Float8 x) {
  return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7]));
}
RWKV_INLINE double sum_of_lanes(Double4 x) {
  return (x[0] + x[2]) + (x[1] + x[3]);
}

RWKV_INLINE Float8 max_lanes(Float8 x, Float8 y) {
  return x > y ? x : y;
}
RWKV_INLINE Double4 max_lanes(Double4 x, Double4 y) {
  return x > y ? x : y;
}

// Written so that the compiler finds the vector instruction.
template <typename Vector>
RWKV_INLINE Vector sqrt_lanes(Vector x) {
  Vector result;
  for (size_t lane = 0; lane < sizeof x / sizeof x[0]; ++lane) {
    result[lane] = std::sqrt(x[lane]);
  }
  return result;
}

// e^x for x <= 0; zero below the smallest normal float. Error under 2 units in the last place:
// x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 split in two, so that r is exact to a float's
// precision), a polynomial for e^r, and n added to the exponent.
RWKV_INLINE Float8 exp_lanes(Float8 x) {
  constexpr float kSmallest = -87.33654f;
  const Float8 clamped = x > kSmallest ? x : Float8{} + kSmallest;
  // Adding and taking off 1.5 * 2^23 rounds to the nearest integer.
  constexpr float kRound = 12582912.0f;
  const Float8 n = (clamped * 1.44269504f + kRound) - kRound;
  const Float8 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Float8 poly = Float8{} + 1.0f / 5040;
  poly = poly * r + 1.0f / 720;
  poly = poly * r + 1.0f / 120;
  poly = poly * r + 1.0f / 24;
  poly = poly * r + 1.0f / 6;
  poly = poly * r + 0.5f;
  poly = poly * r + 1.0f;
  poly = poly * r + 1.0f;
  const Int8x32 exponent = (__builtin_convertvector(n, Int8x32) + 127) << 23;
  Float8 power;
  std::memcpy(&power, &exponent, sizeof power);
  const Float8 result = poly * power;
  // A NaN fails every comparison, and so falls through to itself.
  return x > kSmallest ? result : (x <= kSmallest ? Float8{} : x);
}

// Only the tests' float64 comparisons come here.
RWKV_INLINE Double4 exp_lanes(Double4 x) {
  Double4 result;
  for (int lane = 0; lane < 4; ++lane) {
    result[lane] = std::exp(x[lane]);
  }
  return result;
}

// 1 / (1 + e^-x), with an exponential that cannot overflow.
template <typename Vector>
RWKV_INLINE Vector sigmoid_lanes(Vector x) {
  const Vector e = exp_lanes(x > 0 ? -x : x);
  const Vector one = Vector{} + 1;
  return (x > 0 ? one : e) / (one + e);
}

}  // namespace rwkv::ops
