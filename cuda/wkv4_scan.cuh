// The maths that the wkv4 kernels share: sums with a scale of their own, and sub-chunks of tokens.
//
// Everything is in base 2: w2 = w_log log2(e), k2 = k log2(e), u2 = u log2(e), so that an
// exponential is one instruction. Names are those of model/ops/wkv4.h.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/intrinsics.cuh"
#include "cuda/vector_io.cuh"
#include "cuda/wkv4_kernel.h"

namespace rwkv::wkv4 {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// The logarithm of nothing. With -inf there would be inf - inf.
constexpr float kNoScale = -1e30f;

// The pair (a, b) 2^p: numerator and denominator of what came before a token, or, with -P for p,
// the adjoints al and be of what comes after.
struct Sums {
  float a, b, p;
};

__device__ __forceinline__ Sums nothing() {
  return {0.0f, 0.0f, kNoScale};
}

// The sums over two neighbouring stretches; those of `earlier` fade by 2^decay on their way to the
// end of the other (for adjoints: to its beginning, and `earlier` is the later stretch). The side
// with the larger scale keeps its factor 1: one exponential, no overflow.
__device__ __forceinline__ Sums combined(Sums earlier, float decay, Sums own) {
  const float earlier_p = earlier.p + decay;
  const float difference = earlier_p - own.p;
  const float weight = fast_exp2(-fabsf(difference));
  return difference >= 0.0f
             ? Sums{fmaf(weight, own.a, earlier.a), fmaf(weight, own.b, earlier.b), earlier_p}
             : Sums{fmaf(weight, earlier.a, own.a), fmaf(weight, earlier.b, own.b), own.p};
}

// The same sums with the power of two nearest below `magnitude` moved into the scale, exactly. Else
// a scale would stay at a maximum that has long faded, and waste the range of the numbers.
__device__ __forceinline__ Sums rescaled(Sums sums, float magnitude) {
  const int exponent = static_cast<int>(__float_as_uint(magnitude) >> 23 & 255);
  if (exponent == 0) {
    return {sums.a, sums.b, kNoScale};
  }
  // Infinite or not a number, or the factor below would be a denormal: left as it is.
  if (exponent >= 254) {
    return sums;
  }
  const float factor = __uint_as_float(static_cast<uint32_t>(254 - exponent) << 23);
  return {sums.a * factor, sums.b * factor, sums.p + static_cast<float>(exponent - 127)};
}
__device__ __forceinline__ Sums rescaled_state(Sums state) {
  return rescaled(state, state.b);
}
__device__ __forceinline__ Sums rescaled_adjoint(Sums adjoint) {
  return rescaled(adjoint, fmaxf(fabsf(adjoint.a), fabsf(adjoint.b)));
}

// ---- Memory -------------------------------------------------------------------------------------

// Three planes [3, A] at `planes`, channel c.
__device__ __forceinline__ Sums load_sums(const float* planes, int64_t dim, int64_t c) {
  return {planes[c], planes[dim + c], planes[2 * dim + c]};
}
__device__ __forceinline__ void store_sums(float* planes, int64_t dim, int64_t c, Sums sums) {
  planes[c] = sums.a;
  planes[dim + c] = sums.b;
  planes[2 * dim + c] = sums.p;
}

// Scale of a state that came in as a e^p, and the other way round.
__device__ __forceinline__ float scale_in_base_2(float p) {
  return fmaxf(p * kLog2E, kNoScale);
}
__device__ __forceinline__ Sums load_state(const float* state, int64_t dim, int64_t c) {
  Sums sums = load_sums(state, dim, c);
  sums.p = scale_in_base_2(sums.p);
  return rescaled(sums, sums.b == 0.0f ? fabsf(sums.a) : sums.b);
}
__device__ __forceinline__ void store_state(float* state, int64_t dim, int64_t c, Sums sums) {
  sums.p *= kLn2;
  store_sums(state, dim, c, sums);
}

// The adjoint of the state after the last token, from the gradient of what was handed out, whose
// scale is the last of the carries'.
__device__ __forceinline__ Sums load_adjoint(const float* dstate_out,
                                             float final_p,
                                             int64_t dim,
                                             int64_t c) {
  if (dstate_out == nullptr) {
    return nothing();
  }
  return rescaled_adjoint({dstate_out[c], -dstate_out[dim + c], -final_p});
}
// The gradient of the state before the first token, from its adjoint.
__device__ __forceinline__ void store_dstate(
    float* dstate, const float* state, int64_t dim, int64_t c, Sums adjoint) {
  const float factor = fast_exp2(adjoint.p + scale_in_base_2(state[2 * dim + c]));
  store_sums(dstate, dim, c, {adjoint.a * factor, -adjoint.b * factor, 0.0f});
}

// ---- One channel, token by token ----------------------------------------------------------------

struct Channel {
  float w2, decay;  // decay = 2^w2 = e^w_log
  float u2, bonus;  // bonus = 2^u2 = e^u
};
__device__ __forceinline__ Channel load_channel(const float* w_log, const float* u, int64_t c) {
  const float w2 = w_log[c] * kLog2E;
  const float u2 = u[c] * kLog2E;
  return {w2, exp2f(w2), u2, exp2f(u2)};
}

__device__ __forceinline__ float sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(x * -kLog2E));
}

__device__ __forceinline__ Sums after_token(Sums state, float w2, float k, float v) {
  return combined(state, w2, {v, 1.0f, k * kLog2E});
}

// y of a token, and its denominator as inverse 2^scale (the reciprocal of D 2^-scale).
struct Average {
  float y;
  float inverse;
  float scale;
};
__device__ __forceinline__ Average average(Sums state, float u2, float k, float v) {
  const float own = fmaf(k, kLog2E, u2);
  const float scale = fmaxf(state.p, own);
  const float before = fast_exp2(state.p - scale);
  const float now = fast_exp2(own - scale);
  const float inverse = fast_reciprocal(fmaf(before, state.b, now));
  return {fmaf(before, state.a, now * v) * inverse, inverse, scale};
}

// The gradients at a token that sees `state`, and its part in those of the parameters; `adjoint` is
// that behind the token, and becomes the one before it.
struct TokenGradients {
  float dk, dv, du, dw_log;
};
__device__ __forceinline__ TokenGradients
through_token(Sums state, const Channel& channel, float k, float v, float dy, Sums& adjoint) {
  const Average token = average(state, channel.u2, k, v);
  const float q = dy * token.inverse;
  const float bonus = fast_exp2(fmaf(k, kLog2E, channel.u2) - token.scale) * q;
  // At most about 1: later denominators, whose inverse the adjoint's scale is, hold e^k.
  const float through_state = fast_exp2(fmaf(k, kLog2E, adjoint.p));
  const float d = bonus * (v - token.y);
  const TokenGradients gradients{.dk = fmaf(through_state, fmaf(adjoint.a, v, -adjoint.b), d),
                                 .dv = fmaf(through_state, adjoint.a, bonus),
                                 .du = d,
                                 .dw_log = fast_exp2(channel.w2 + state.p + adjoint.p) *
                                           (state.a * adjoint.a - state.b * adjoint.b)};
  adjoint = combined(adjoint, channel.w2, {q, q * token.y, -token.scale});
  return gradients;
}

}  // namespace rwkv::wkv4
