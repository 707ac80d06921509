// Vectors for the CPU kernels. A kernel's body is a template over the vector that it computes with,
// and is compiled three times: with the registers of AVX-512, with those of AVX2, and with pairs of
// those that any x86-64 has. with_vectors chooses when it is called.
//
//   with_vectors<float>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
//     body<Vector>(from, to, size);
//   });
//
// Bodies and all that they call are RWKV_INLINE: only what is inlined there is compiled for the
// instructions that were chosen.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include <ATen/Version.h>

#define RWKV_INLINE inline __attribute__((always_inline))
// For the lambdas in a kernel: [&](int64_t i) RWKV_INLINE_LAMBDA { ... }.
#define RWKV_INLINE_LAMBDA __attribute__((always_inline))

namespace rwkv::ops {

// A bf16 number in memory: the top half of a float.
struct Bf16 {
  uint16_t bits;
};

// What is computed with for elements of a type in memory.
template <typename Element>
using ScalarOf = std::conditional_t<std::is_same_v<Element, Bf16>, float, Element>;

template <typename Scalar, size_t kBytes>
struct VectorOfBytes {
  typedef Scalar Vector __attribute__((vector_size(kBytes)));
};
template <typename Vector>
using LaneOf = std::remove_cvref_t<decltype(Vector{}[0])>;
template <typename Vector>
inline constexpr int64_t kLanes = sizeof(Vector) / sizeof(LaneOf<Vector>);
// As many lanes of another type.
template <typename Vector, typename Lane>
using SameLanes = typename VectorOfBytes<Lane, kLanes<Vector> * sizeof(Lane)>::Vector;
// What comparing two vectors gives: all bits of a lane, or none.
template <typename Vector>
using MaskOf = decltype(Vector{} < Vector{});

// ---- Choosing -----------------------------------------------------------------------------------

// Names a vector in a call.
template <typename Vector>
struct As {};

enum class CpuVectors { kAny, kAvx2, kAvx512 };
// As LibTorch chooses for its own kernels: the environment's ATEN_CPU_CAPABILITY (default, avx2)
// lowers both.
inline CpuVectors cpu_vectors() {
  static const CpuVectors chosen = [] {
    const std::string name = at::get_cpu_capability();
    return name == "AVX512" ? CpuVectors::kAvx512
           : name == "AVX2" ? CpuVectors::kAvx2
                            : CpuVectors::kAny;
  }();
  return chosen;
}

// x86-64-v4 is AVX-512, v3 is AVX2 with FMA.
template <typename Scalar, typename Body>
__attribute__((target("arch=x86-64-v4"), noinline)) void with_avx512(const Body& body) {
  body(As<typename VectorOfBytes<Scalar, 64>::Vector>{});
}
template <typename Scalar, typename Body>
__attribute__((target("arch=x86-64-v3"), noinline)) void with_avx2(const Body& body) {
  body(As<typename VectorOfBytes<Scalar, 32>::Vector>{});
}
template <typename Scalar, typename Body>
__attribute__((noinline)) void with_any(const Body& body) {
  body(As<typename VectorOfBytes<Scalar, 32>::Vector>{});
}
// Calls `body` with a vector of `Scalar`s.
template <typename Scalar, typename Body>
void with_vectors(const Body& body) {
  switch (cpu_vectors()) {
    case CpuVectors::kAvx512:
      return with_avx512<Scalar>(body);
    case CpuVectors::kAvx2:
      return with_avx2<Scalar>(body);
    case CpuVectors::kAny:
      return with_any<Scalar>(body);
  }
}

// ---- Memory -------------------------------------------------------------------------------------

template <typename Vector>
RWKV_INLINE Vector load_lanes(const LaneOf<Vector>* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
template <typename Vector>
RWKV_INLINE Vector load_lanes(const Bf16* from) {
  SameLanes<Vector, uint16_t> bits;
  std::memcpy(&bits, from, sizeof bits);
  const auto wide = __builtin_convertvector(bits, SameLanes<Vector, uint32_t>) << 16;
  Vector x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

template <typename Vector>
RWKV_INLINE void store_lanes(LaneOf<Vector>* to, Vector x) {
  std::memcpy(to, &x, sizeof x);
}
// Rounds to nearest even; a NaN stays one (its quiet bit is set, or rounding could make it inf).
template <typename Vector>
RWKV_INLINE void store_lanes(Bf16* to, Vector x) {
  SameLanes<Vector, uint32_t> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto quiet = (bits >> 16) | 0x40;
  const auto narrow =
      __builtin_convertvector(x == x ? rounded : quiet, SameLanes<Vector, uint16_t>);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The same for the first `count` lanes of a row's last, partial vector. The other lanes read zero.
template <typename Vector, typename Element>
RWKV_INLINE Vector load_lanes(const Element* from, int64_t count) {
  if (count == kLanes<Vector>) {
    return load_lanes<Vector>(from);
  }
  Element padded[kLanes<Vector>] = {};
  std::memcpy(padded, from, static_cast<size_t>(count) * sizeof(Element));
  return load_lanes<Vector>(padded);
}
template <typename Vector, typename Element>
RWKV_INLINE void store_lanes(Element* to, Vector x, int64_t count) {
  if (count == kLanes<Vector>) {
    store_lanes(to, x);
    return;
  }
  Element padded[kLanes<Vector>];
  store_lanes(padded, x);
  std::memcpy(to, padded, static_cast<size_t>(count) * sizeof(Element));
}

// One element as a number.
template <typename Scalar>
RWKV_INLINE Scalar load_one(const Scalar* from) {
  return *from;
}
RWKV_INLINE float load_one(const Bf16* from) {
  const uint32_t bits = uint32_t{from->bits} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Asks for the cache line at an address that is read soon, where the way there is not the straight
// one that the processor sees ahead. It may lie outside of any tensor.
RWKV_INLINE void prefetch(const void* address) {
  __builtin_prefetch(address, 0, 2);
}

// Calls `work(first, count)` for each vector of a row: the count is a constant but for the last.
template <typename Vector, typename Work>
RWKV_INLINE void for_each_vector(int64_t size, const Work& work) {
  int64_t first = 0;
  for (; first + kLanes<Vector> <= size; first += kLanes<Vector>) {
    work(first, kLanes<Vector>);
  }
  if (first < size) {
    work(first, size - first);
  }
}

// The same with a number from 0 to 3 that goes round: for sums, each of which would wait for the
// last addition if there were but one.
inline constexpr int kTurns = 4;
template <typename Vector, typename Work>
RWKV_INLINE void for_each_vector_in_turns(int64_t size, const Work& work) {
  int64_t first = 0;
  for (; first + kTurns * kLanes<Vector> <= size; first += kTurns * kLanes<Vector>) {
    work(first, kLanes<Vector>, std::integral_constant<int, 0>{});
    work(first + kLanes<Vector>, kLanes<Vector>, std::integral_constant<int, 1>{});
    work(first + 2 * kLanes<Vector>, kLanes<Vector>, std::integral_constant<int, 2>{});
    work(first + 3 * kLanes<Vector>, kLanes<Vector>, std::integral_constant<int, 3>{});
  }
  for (; first < size; first += kLanes<Vector>) {
    const int64_t rest = size - first;
    work(first, rest < kLanes<Vector> ? rest : kLanes<Vector>, std::integral_constant<int, 0>{});
  }
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// Zero in all but the first `count` lanes.
template <typename Vector>
RWKV_INLINE Vector first_lanes(Vector x, int64_t count) {
  if (count == kLanes<Vector>) {
    return x;
  }
  MaskOf<Vector> lane;
  for (int64_t i = 0; i < kLanes<Vector>; ++i) {
    lane[i] = static_cast<LaneOf<MaskOf<Vector>>>(i);
  }
  return lane < static_cast<LaneOf<MaskOf<Vector>>>(count) ? x : Vector{};
}

// One lane from all: halves are combined with each other until there is but one.
template <typename Vector, typename Combine>
RWKV_INLINE LaneOf<Vector> reduce_lanes(Vector x, const Combine& combine) {
  using Lane = LaneOf<Vector>;
  if constexpr (kLanes<Vector> == 2) {
    return combine(x[0], x[1]);
  } else {
    typename VectorOfBytes<Lane, sizeof x / 2>::Vector halves[2];
    std::memcpy(halves, &x, sizeof x);
    return reduce_lanes(combine(halves[0], halves[1]), combine);
  }
}
template <typename Vector>
RWKV_INLINE LaneOf<Vector> sum_of_lanes(Vector x) {
  return reduce_lanes(x, [](auto a, auto b) RWKV_INLINE_LAMBDA { return a + b; });
}
template <typename Mask>
RWKV_INLINE bool all_lanes(Mask mask) {
  return reduce_lanes(mask, [](auto a, auto b) RWKV_INLINE_LAMBDA { return a & b; }) != 0;
}

// A lane of y if x is a NaN.
template <typename Vector>
RWKV_INLINE Vector max_lanes(Vector x, Vector y) {
  return x > y ? x : y;
}
template <typename Vector>
RWKV_INLINE Vector min_lanes(Vector x, Vector y) {
  return x < y ? x : y;
}

// Written so that the compiler finds the vector instruction.
template <typename Vector>
RWKV_INLINE Vector sqrt_lanes(Vector x) {
  Vector result = {};
  for (int64_t lane = 0; lane < kLanes<Vector>; ++lane) {
    result[lane] = std::sqrt(x[lane]);
  }
  return result;
}

// e^x for x up to 88; zero where it is below the smallest normal float. Error of fp32 under 2 units
// in the last place: x = n ln 2 + r with |r| <= ln 2 / 2 (ln 2 split in two, so that r is exact to
// a float's precision), a polynomial for e^r, and n added to the exponent. A NaN passes every step.
// fp64 is for the tests' comparisons alone.
template <typename Vector>
RWKV_INLINE Vector exp_lanes(Vector x) {
  if constexpr (std::is_same_v<LaneOf<Vector>, double>) {
    Vector result = {};
    for (int64_t lane = 0; lane < kLanes<Vector>; ++lane) {
      result[lane] = std::exp(x[lane]);
    }
    return result;
  } else {
    constexpr float kSmallest = -87.33654f;
    const Vector clamped = x < kSmallest ? Vector{} + kSmallest : x;
    // Adding and taking off 1.5 * 2^23 rounds to the nearest integer.
    constexpr float kRound = 12582912.0f;
    const Vector n = (clamped * 1.44269504f + kRound) - kRound;
    const Vector r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    Vector poly = Vector{} + 1.0f / 5040;
    poly = poly * r + 1.0f / 720;
    poly = poly * r + 1.0f / 120;
    poly = poly * r + 1.0f / 24;
    poly = poly * r + 1.0f / 6;
    poly = poly * r + 0.5f;
    poly = poly * r + 1.0f;
    poly = poly * r + 1.0f;
    const auto exponent = (__builtin_convertvector(n, MaskOf<Vector>) + 127) << 23;
    Vector power;
    std::memcpy(&power, &exponent, sizeof power);
    return x < kSmallest ? Vector{} : poly * power;
  }
}

// 1 / (1 + e^-x), with an exponential that cannot overflow.
template <typename Vector>
RWKV_INLINE Vector sigmoid_lanes(Vector x) {
  const Vector e = exp_lanes(x > 0 ? -x : x);
  const Vector one = Vector{} + 1;
  return (x > 0 ? one : e) / (one + e);
}

}  // namespace rwkv::ops
