// wkv4 with one thread per channel: the second opinion on the kernels that cut time into pieces.
// Source: model/ops/wkv4.h, which has the equations.
//
// Numbers: all fp32. A pair such as (A, B) is (x, y) 2^exponent with a whole exponent, and so is
// the decay, e^w = mantissa 2^exponent: changing exponents then rounds nothing, and an error cannot
// grow with the number of tokens. Whatever w < 0 and k, every power of two that is taken of a sum's
// term is at most one.
//
// Launch shape: a thread owns a channel of a batch row and walks all of T, 64 threads a block so
// that few channels still reach most of the GPU. Its steps depend on each other: expect latency,
// not bandwidth, to set the time. Backward goes by tiles of 128 tokens from the last to the first:
// it recomputes the states in a tile from the one that forward saved, keeps them in local memory
// (1.5 KB a thread, which the first-level cache holds in good part) and walks back.
// Floor, bytes an element in bf16: forward 6, with a gate 8; backward 10, with a gate 14.
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"
#include "cuda/wkv4_kernels.h"

namespace rwkv {
namespace {

constexpr int kThreads = 64;
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// The exponent of zero: far below that of any number, and far enough from the end of fp32 that sums
// of two are finite.
constexpr float kExponentOfZero = -1.44269504e38f;

// 2^n for a whole n; zero where that is no normal number, at most 2^127.
__device__ __forceinline__ float power_of_two(float n) {
  return n < -126.0f ? 0.0f : __int_as_float((static_cast<int>(fminf(n, 127.0f)) + 127) << 23);
}

// Two numbers, x 2^exponent and y 2^exponent.
struct Scaled {
  float x;
  float y;
  float exponent;
};

// The same with `size`, the magnitude of x or y, brought into [1, 2).
__device__ __forceinline__ Scaled normalized(Scaled pair, float size) {
  if (pair.x == 0.0f && pair.y == 0.0f) {
    return {0.0f, 0.0f, kExponentOfZero};
  }
  const float exponent = fminf(static_cast<float>((__float_as_int(size) >> 23) - 127), 126.0f);
  const float scale = power_of_two(-exponent);
  return {pair.x * scale, pair.y * scale, pair.exponent + exponent};
}
// The denominator decides: it is what the exponents of k are compared with.
__device__ __forceinline__ Scaled normalized_state(Scaled state) {
  return normalized(state, state.y != 0.0f ? fabsf(state.y) : fabsf(state.x));
}
__device__ __forceinline__ Scaled normalized_adjoint(Scaled adjoint) {
  return normalized(adjoint, fmaxf(fabsf(adjoint.x), fabsf(adjoint.y)));
}

__device__ __forceinline__ Scaled with_whole_exponent(Scaled pair) {
  const float whole = floorf(pair.exponent);
  const float rest = fast_exp2(pair.exponent - whole);
  return {pair.x * rest, pair.y * rest, whole};
}

// A state in memory: rows a, b, p, `stride` apart.
__device__ __forceinline__ Scaled load_state(const float* at, int64_t stride, float exponent_unit) {
  return normalized_state(with_whole_exponent({at[0], at[stride], at[2 * stride] * exponent_unit}));
}
__device__ __forceinline__ void store_state(Scaled state,
                                            float* at,
                                            int64_t stride,
                                            float exponent_unit) {
  at[0] = state.x;
  at[stride] = state.y;
  at[2 * stride] = state.exponent * exponent_unit;
}

struct Decay {
  float mantissa;
  float exponent;
};
// In double, once a thread: an error of e^w is one of every token's weight, and grows with age.
__device__ __forceinline__ Decay decay_of(float w_log) {
  const double power = static_cast<double>(w_log) * 1.4426950408889634;
  const double whole = floor(power);
  return {static_cast<float>(exp2(power - whole)), static_cast<float>(whole)};
}

// The state after one more token.
__device__ __forceinline__ Scaled advanced(Scaled state, Decay decay, float k, float v) {
  const float past_exponent = state.exponent + decay.exponent;
  const float top = fmaxf(past_exponent, ceilf(k * kLog2E));
  const float past = decay.mantissa * power_of_two(past_exponent - top);
  const float now = fast_exp2(fmaf(k, kLog2E, -top));
  return normalized_state({past * state.x + now * v, past * state.y + now, top});
}

// y_t = numerator / denominator, and what backward needs of it.
struct Average {
  float y;
  float denominator;  // in units of 2^top, as is:
  float now;          // e^{u + k}
  float top;
};
__device__ __forceinline__ Average averaged(Scaled state, float u_log2, float k, float v) {
  const float top = fmaxf(state.exponent, ceilf(fmaf(k, kLog2E, u_log2)));
  const float past = power_of_two(state.exponent - top);
  const float now = fast_exp2(fmaf(k, kLog2E, u_log2 - top));
  const float denominator = past * state.y + now;
  return {(past * state.x + now * v) / denominator, denominator, now, top};
}

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}

// Where a thread's channel lies.
struct Place {
  bool exists;
  int64_t batch;
  int64_t channel;
};
template <typename Element>
__device__ __forceinline__ Place own_place(const Wkv4Inputs<Element>& in) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  return {index < in.batch_size * in.dim_att, index / in.dim_att, index % in.dim_att};
}

template <typename Element>
__device__ __forceinline__ bool is_start(const Wkv4Inputs<Element>& in, int64_t batch, int64_t t) {
  return in.starts != nullptr && in.starts[batch * in.seq_len + t];
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    wkv4_plain_forward_kernel(const Wkv4Forward<Element> pass) {
  const Wkv4Inputs<Element>& in = pass.in;
  const auto [exists, batch, channel] = own_place(in);
  if (!exists) {
    return;
  }
  const int64_t stride = in.dim_att;
  const int64_t first = batch * in.seq_len * stride + channel;
  const int64_t num_tiles = ceil_div(in.seq_len, kWkv4CarryTokens);
  float* carries = pass.carries == nullptr
                       ? nullptr
                       : pass.carries + batch * (num_tiles + 1) * 3 * stride + channel;
  const Decay decay = decay_of(in.w_log[channel]);
  const float u_log2 = in.u[channel] * kLog2E;
  Scaled state = load_state(in.state + batch * 3 * stride + channel, stride, kLog2E);
  for (int64_t t = 0; t < in.seq_len; ++t) {
    if (carries != nullptr && t % kWkv4CarryTokens == 0) {
      store_state(state, carries + t / kWkv4CarryTokens * 3 * stride, stride, 1.0f);
    }
    if (is_start(in, batch, t)) {
      state = {0.0f, 0.0f, kExponentOfZero};
    }
    const int64_t at = first + t * stride;
    const float k = to_float(in.k[at]);
    const float v = to_float(in.v[at]);
    float y = averaged(state, u_log2, k, v).y;
    if (in.r != nullptr) {
      y *= sigmoid(to_float(in.r[at]));
    }
    pass.y[at] = from_float<Element>(y);
    state = advanced(state, decay, k, v);
  }
  store_state(state, pass.state_out + batch * 3 * stride + channel, stride, kLn2);
  if (carries != nullptr) {
    store_state(state, carries + num_tiles * 3 * stride, stride, 1.0f);
  }
}

// Leaves dw and du of each batch row in scratch, [B, 2, A].
template <typename Element>
__global__ void __launch_bounds__(kThreads)
    wkv4_plain_backward_kernel(const Wkv4Backward<Element> pass) {
  const Wkv4Inputs<Element>& in = pass.in;
  const auto [exists, batch, channel] = own_place(in);
  if (!exists) {
    return;
  }
  const int64_t stride = in.dim_att;
  const int64_t first = batch * in.seq_len * stride + channel;
  const int64_t state_at = batch * 3 * stride + channel;
  const int64_t num_tiles = ceil_div(in.seq_len, kWkv4CarryTokens);
  const float* carries = pass.carries + batch * (num_tiles + 1) * 3 * stride + channel;
  const Decay decay = decay_of(in.w_log[channel]);
  const float u_log2 = in.u[channel] * kLog2E;

  // (al, be) of the equations.
  Scaled adjoint{0.0f, 0.0f, kExponentOfZero};
  if (pass.dstate_out != nullptr) {
    const float unit = -carries[(num_tiles * 3 + 2) * stride];
    adjoint = normalized_adjoint(with_whole_exponent(
        {pass.dstate_out[state_at], -pass.dstate_out[state_at + stride], unit}));
  }
  float dw = 0.0f;
  float du = 0.0f;
  Scaled before[kWkv4CarryTokens];
  for (int64_t tile = num_tiles - 1; tile >= 0; --tile) {
    const int64_t begin = tile * kWkv4CarryTokens;
    const int count = static_cast<int>(in.seq_len - begin < kWkv4CarryTokens ? in.seq_len - begin
                                                                             : kWkv4CarryTokens);
    Scaled state = load_state(carries + tile * 3 * stride, stride, 1.0f);
    for (int i = 0; i < count; ++i) {
      if (is_start(in, batch, begin + i)) {
        state = {0.0f, 0.0f, kExponentOfZero};
      }
      before[i] = state;
      const int64_t at = first + (begin + i) * stride;
      state = advanced(state, decay, to_float(in.k[at]), to_float(in.v[at]));
    }
    // Sums of sums: their rounding grows with the tile, not with T.
    float dw_tile = 0.0f;
    float du_tile = 0.0f;
    for (int i = count - 1; i >= 0; --i) {
      const int64_t at = first + (begin + i) * stride;
      const float k = to_float(in.k[at]);
      const float v = to_float(in.v[at]);
      state = before[i];
      const Average average = averaged(state, u_log2, k, v);
      float dy = to_float(pass.dy[at]);
      if (in.r != nullptr) {
        const float gate = sigmoid(to_float(in.r[at]));
        dy *= gate;
        pass.dr[at] = from_float<Element>(dy * average.y * (1.0f - gate));
      }
      const float s = dy / average.denominator;  // in units of 2^-top
      const float through_bonus = average.now * s * (v - average.y);
      const float later = fast_exp2(fmaf(k, kLog2E, adjoint.exponent));
      pass.dv[at] = from_float<Element>(average.now * s + later * adjoint.x);
      pass.dk[at] = from_float<Element>(through_bonus + later * (adjoint.x * v - adjoint.y));
      du_tile += through_bonus;
      dw_tile += decay.mantissa * power_of_two(decay.exponent + state.exponent + adjoint.exponent) *
                 (state.x * adjoint.x - state.y * adjoint.y);
      if (is_start(in, batch, begin + i)) {
        adjoint = {0.0f, 0.0f, kExponentOfZero};
        continue;
      }
      const float past_exponent = adjoint.exponent + decay.exponent;
      const float top = fmaxf(past_exponent, -average.top);
      const float past = decay.mantissa * power_of_two(past_exponent - top);
      const float now = power_of_two(-average.top - top) * s;
      adjoint =
          normalized_adjoint({past * adjoint.x + now, past * adjoint.y + now * average.y, top});
    }
    dw += dw_tile;
    du += du_tile;
  }
  // In units of the p that was given. Nothing of a state without tokens (p far below all) is left.
  const float unit = fast_exp2(adjoint.exponent + in.state[state_at + 2 * stride] * kLog2E);
  pass.dstate[state_at] = unit * adjoint.x;
  pass.dstate[state_at + stride] = -unit * adjoint.y;
  pass.dstate[state_at + 2 * stride] = 0.0f;
  pass.scratch[batch * 2 * stride + channel] = dw;
  pass.scratch[(batch * 2 + 1) * stride + channel] = du;
}

// Sums dw and du over batch rows, in their order.
__global__ void __launch_bounds__(kThreads) wkv4_plain_sum_kernel(
    const float* partial, int64_t batch_size, int64_t dim_att, float* dw, float* du) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= dim_att) {
    return;
  }
  float dw_sum = 0.0f;
  float du_sum = 0.0f;
  for (int64_t batch = 0; batch < batch_size; ++batch) {
    dw_sum += partial[batch * 2 * dim_att + channel];
    du_sum += partial[(batch * 2 + 1) * dim_att + channel];
  }
  dw[channel] = dw_sum;
  du[channel] = du_sum;
}

LaunchShape shape_of(int64_t threads) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(threads, kThreads))),
          .block = dim3(kThreads)};
}

}  // namespace

int64_t wkv4_plain_scratch_floats(Wkv4Pass pass, int64_t batch_size, int64_t dim_att) {
  return pass == Wkv4Pass::kForward ? 0 : batch_size * 2 * dim_att;
}

template <typename Element>
cudaError_t launch_wkv4_plain(const Wkv4Forward<Element>& pass, cudaStream_t stream) {
  return launch_kernel(&wkv4_plain_forward_kernel<Element>,
                       shape_of(pass.in.batch_size * pass.in.dim_att),
                       stream,
                       pass);
}

template <typename Element>
cudaError_t launch_wkv4_plain_backward(const Wkv4Backward<Element>& pass, cudaStream_t stream) {
  const Wkv4Inputs<Element>& in = pass.in;
  const cudaError_t error = launch_kernel(
      &wkv4_plain_backward_kernel<Element>, shape_of(in.batch_size * in.dim_att), stream, pass);
  return error != cudaSuccess ? error
                              : launch_kernel(&wkv4_plain_sum_kernel,
                                              shape_of(in.dim_att),
                                              stream,
                                              static_cast<const float*>(pass.scratch),
                                              in.batch_size,
                                              in.dim_att,
                                              pass.dw,
                                              pass.du);
}

#define RWKV_INSTANTIATE(Element)                                                    \
  template cudaError_t launch_wkv4_plain(const Wkv4Forward<Element>&, cudaStream_t); \
  template cudaError_t launch_wkv4_plain_backward(const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
