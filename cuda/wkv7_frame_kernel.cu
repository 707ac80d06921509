// wkv7_inputs and wkv7_output, forward and backward. Source and equations: model/ops/wkv7_inputs.h
// and wkv7_output.h.
//
// Launch shape: a warp has one head and walks a strip of 32 tokens, so that the head's parameters,
// and in backward their gradients, stay in its registers; a lane has N / 32 neighbouring channels;
// 8 warps a block. Backward leaves a row of sums for each strip, which launch_column_sum adds up.
// Floor, bytes an element in bf16: wkv7_inputs 18, backward 28 (in the first layer 10 and 14),
// wkv7_output 12, backward 22.
#include "cuda/column_sum_kernel.h"
#include "cuda/launch.h"
#include "cuda/packed.cuh"
#include "cuda/wkv7_frame_kernel.h"

namespace rwkv {
namespace {

constexpr int kWarps = 8;
constexpr int kStripLen = 32;
constexpr float kLeastNorm = 1e-12f;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f));
}

// Of a warp: its strip, and where its lane's channels are.
template <int kWidth>
struct Place {
  __device__ explicit Place(const Wkv7FrameSizes& sizes) : n_embd(sizes.H * kWidth * kWarpSize) {
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    strip = warp / sizes.H;
    channel = (warp % sizes.H * kWarpSize + threadIdx.x % kWarpSize) * kWidth;
    begin = strip * kStripLen;
    end = begin + kStripLen < sizes.tokens ? begin + kStripLen : sizes.tokens;
  }
  int64_t n_embd, strip, channel;
  int64_t begin, end;  // tokens; none for a warp too many
};

template <int kWidth, typename Element>
__device__ __forceinline__ void load(const Element* from, float (&x)[kWidth]) {
  const Packed<Element, kWidth> packed = load_packed<kWidth>(from);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    x[i] = to_float(packed.x[i]);
  }
}
template <int kWidth, typename Element>
__device__ __forceinline__ void store(Element* to, const float (&x)[kWidth]) {
  Packed<Element, kWidth> packed;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    packed.x[i] = from_float<Element>(x[i]);
  }
  store_packed(to, packed);
}

// Calls work(i) for each of a lane's channels.
template <int kWidth, typename Work>
__device__ __forceinline__ void for_channels(const Work& work) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    work(i);
  }
}
template <int kWidth, typename Term>
__device__ __forceinline__ float head_sum(const Term& term) {
  float sum = 0.0f;
  for_channels<kWidth>([&](int i) { sum += term(i); });
  return warp_sum(sum);
}

// Row `row` of `rows` of a strip's sums, [strips, rows, C].
template <int kWidth>
__device__ __forceinline__ void store_sums(
    float* scratch, const Place<kWidth>& at, int row, int rows, const float (&sums)[kWidth]) {
  store(scratch + (at.strip * rows + row) * at.n_embd + at.channel, sums);
}

// ---- wkv7_inputs --------------------------------------------------------------------------------

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    wkv7_inputs_kernel(const Wkv7InputsForward<Element> x) {
  const Place<kWidth> at(x.sizes);
  if (at.begin >= at.end) {
    return;
  }
  float k_k[kWidth], k_a[kWidth];
  load(x.k_k + at.channel, k_k);
  load(x.k_a + at.channel, k_a);
  for (int64_t token = at.begin; token < at.end; ++token) {
    const int64_t here = token * at.n_embd + at.channel;
    float k[kWidth], alpha[kWidth], p[kWidth], a[kWidth], b[kWidth];
    load(x.k + here, k);
    load(x.a_raw + here, alpha);
    for_channels<kWidth>([&](int i) { p[i] = k[i] * k_k[i]; });
    const float inverse =
        1.0f / fmaxf(sqrtf(head_sum<kWidth>([&](int i) { return p[i] * p[i]; })), kLeastNorm);
    for_channels<kWidth>([&](int i) {
      alpha[i] = sigmoid(alpha[i]);
      const float kk = p[i] * inverse;
      a[i] = -kk;
      b[i] = kk * alpha[i];
      k[i] = k[i] * (1.0f + (alpha[i] - 1.0f) * k_a[i]);
    });
    store(x.k_out + here, k);
    store(x.a + here, a);
    store(x.b + here, b);
    if (x.v_raw != nullptr) {
      float v[kWidth], q[kWidth], v_first[kWidth];
      load(x.v + here, v);
      load(x.v_raw + here, q);
      load(x.v_first + here, v_first);
      for_channels<kWidth>([&](int i) { v[i] += (v_first[i] - v[i]) * sigmoid(q[i]); });
      store(x.v_out + here, v);
    }
  }
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    wkv7_inputs_backward_kernel(const Wkv7InputsBackward<Element> x) {
  const Place<kWidth> at(x.sizes);
  if (at.begin >= at.end) {
    return;
  }
  float k_k[kWidth], k_a[kWidth], dk_k[kWidth] = {}, dk_a[kWidth] = {};
  load(x.k_k + at.channel, k_k);
  load(x.k_a + at.channel, k_a);
  for (int64_t token = at.begin; token < at.end; ++token) {
    const int64_t here = token * at.n_embd + at.channel;
    float k[kWidth], alpha[kWidth], dk_out[kWidth], da[kWidth], db[kWidth], p[kWidth], dkk[kWidth];
    load(x.k + here, k);
    load(x.a_raw + here, alpha);
    load(x.dk_out + here, dk_out);
    load(x.da + here, da);
    load(x.db + here, db);
    for_channels<kWidth>([&](int i) {
      alpha[i] = sigmoid(alpha[i]);
      p[i] = k[i] * k_k[i];
      dkk[i] = alpha[i] * db[i] - da[i];
    });
    const float norm = sqrtf(head_sum<kWidth>([&](int i) { return p[i] * p[i]; }));
    const float inverse = 1.0f / fmaxf(norm, kLeastNorm);
    const float product = head_sum<kWidth>([&](int i) { return p[i] * dkk[i]; });
    // Of the projection on kk; none where the norm is cut off.
    const float share = norm > kLeastNorm ? product * inverse : 0.0f;
    float dk[kWidth], da_raw[kWidth];
    for_channels<kWidth>([&](int i) {
      const float kk = p[i] * inverse;
      const float dp = (dkk[i] - kk * share) * inverse;
      dk[i] = dk_out[i] * (1.0f + (alpha[i] - 1.0f) * k_a[i]) + k_k[i] * dp;
      da_raw[i] = (kk * db[i] + dk_out[i] * k[i] * k_a[i]) * alpha[i] * (1.0f - alpha[i]);
      dk_k[i] += k[i] * dp;
      dk_a[i] += dk_out[i] * k[i] * (alpha[i] - 1.0f);
    });
    store(x.dk + here, dk);
    store(x.da_raw + here, da_raw);
    if (x.v_raw != nullptr) {
      float v[kWidth], q[kWidth], v_first[kWidth], dv[kWidth];
      load(x.v + here, v);
      load(x.v_raw + here, q);
      load(x.v_first + here, v_first);
      load(x.dv_out + here, dv);
      for_channels<kWidth>([&](int i) {
        const float gate = sigmoid(q[i]), dv_out = dv[i];
        q[i] = dv_out * (v_first[i] - v[i]) * gate * (1.0f - gate);
        v_first[i] = gate * dv_out;
        dv[i] = (1.0f - gate) * dv_out;
      });
      store(x.dv_raw + here, q);
      store(x.dv_first + here, v_first);
      store(x.dv + here, dv);
    }
  }
  store_sums(x.scratch, at, 0, 2, dk_k);
  store_sums(x.scratch, at, 1, 2, dk_a);
}

// ---- wkv7_output --------------------------------------------------------------------------------

// y less the mean of its head, times its rstd.
template <int kWidth>
__device__ __forceinline__ float normalise(float eps, float (&y)[kWidth]) {
  constexpr float kShare = 1.0f / (kWidth * kWarpSize);
  const float mean = head_sum<kWidth>([&](int i) { return y[i]; }) * kShare;
  for_channels<kWidth>([&](int i) { y[i] -= mean; });
  const float variance = head_sum<kWidth>([&](int i) { return y[i] * y[i]; }) * kShare;
  const float rstd = reciprocal_sqrt(variance + eps);
  for_channels<kWidth>([&](int i) { y[i] *= rstd; });
  return rstd;
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    wkv7_output_kernel(const Wkv7OutputForward<Element> x) {
  const Place<kWidth> at(x.sizes);
  if (at.begin >= at.end) {
    return;
  }
  float r_k[kWidth], weight[kWidth], bias[kWidth];
  load(x.r_k + at.channel, r_k);
  load(x.weight + at.channel, weight);
  load(x.bias + at.channel, bias);
  for (int64_t token = at.begin; token < at.end; ++token) {
    const int64_t here = token * at.n_embd + at.channel;
    float y[kWidth], r[kWidth], k[kWidth], v[kWidth], g[kWidth];
    load(x.y + here, y);
    load(x.r + here, r);
    load(x.k + here, k);
    load(x.v + here, v);
    load(x.g + here, g);
    normalise(x.eps, y);
    const float bonus = head_sum<kWidth>([&](int i) { return r[i] * k[i] * r_k[i]; });
    for_channels<kWidth>([&](int i) { y[i] = (y[i] * weight[i] + bias[i] + bonus * v[i]) * g[i]; });
    store(x.out + here, y);
  }
}

template <typename Element, int kWidth>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    wkv7_output_backward_kernel(const Wkv7OutputBackward<Element> x) {
  constexpr float kShare = 1.0f / (kWidth * kWarpSize);
  const Place<kWidth> at(x.sizes);
  if (at.begin >= at.end) {
    return;
  }
  float r_k[kWidth], weight[kWidth], bias[kWidth];
  float dr_k[kWidth] = {}, dweight[kWidth] = {}, dbias[kWidth] = {};
  load(x.r_k + at.channel, r_k);
  load(x.weight + at.channel, weight);
  load(x.bias + at.channel, bias);
  for (int64_t token = at.begin; token < at.end; ++token) {
    const int64_t here = token * at.n_embd + at.channel;
    float y[kWidth], r[kWidth], k[kWidth], v[kWidth], g[kWidth], dout[kWidth], dz[kWidth];
    load(x.y + here, y);
    load(x.r + here, r);
    load(x.k + here, k);
    load(x.v + here, v);
    load(x.g + here, g);
    load(x.dout + here, dout);
    const float rstd = normalise(x.eps, y);
    const float bonus = head_sum<kWidth>([&](int i) { return r[i] * k[i] * r_k[i]; });
    for_channels<kWidth>([&](int i) { dz[i] = dout[i] * g[i]; });
    const float e = head_sum<kWidth>([&](int i) { return dz[i] * weight[i]; }) * kShare;
    const float e_y = head_sum<kWidth>([&](int i) { return dz[i] * weight[i] * y[i]; }) * kShare;
    const float ds = head_sum<kWidth>([&](int i) { return dz[i] * v[i]; });
    for_channels<kWidth>([&](int i) {
      const float product = r[i] * k[i];
      dr_k[i] += ds * product;
      dweight[i] += dz[i] * y[i];
      dbias[i] += dz[i];
      dout[i] *= y[i] * weight[i] + bias[i] + bonus * v[i];
      g[i] = (dz[i] * weight[i] - e - y[i] * e_y) * rstd;
      v[i] = bonus * dz[i];
      const float dr = ds * k[i] * r_k[i];
      k[i] = ds * r[i] * r_k[i];
      r[i] = dr;
    });
    store(x.dg + here, dout);
    store(x.dy + here, g);
    store(x.dv + here, v);
    store(x.dr + here, r);
    store(x.dk + here, k);
  }
  store_sums(x.scratch, at, 0, 3, dr_k);
  store_sums(x.scratch, at, 1, 3, dweight);
  store_sums(x.scratch, at, 2, 3, dbias);
}

// ---- Launching ----------------------------------------------------------------------------------

int64_t num_strips(const Wkv7FrameSizes& sizes) {
  return ceil_div(sizes.tokens, kStripLen);
}

// Launches the kernel of the head size, of those for 32, 64 and 128.
template <typename Arguments>
cudaError_t launch_for_head(void (*for32)(Arguments),
                            void (*for64)(Arguments),
                            void (*for128)(Arguments),
                            const Arguments& args,
                            cudaStream_t stream) {
  const int64_t N = args.sizes.N;
  if (N != 32 && N != 64 && N != 128) {
    return cudaErrorInvalidValue;
  }
  const int64_t warps = num_strips(args.sizes) * args.sizes.H;
  return launch_kernel(N == 32   ? for32
                       : N == 64 ? for64
                                 : for128,
                       {.grid = dim3(static_cast<unsigned>(ceil_div(warps, kWarps))),
                        .block = dim3(kWarps * kWarpSize)},
                       stream,
                       args);
}

}  // namespace

int64_t wkv7_frame_scratch_floats(const Wkv7FrameSizes& sizes) {
  return num_strips(sizes) * 3 * sizes.H * sizes.N;
}

template <typename Element>
cudaError_t launch_wkv7_inputs(const Wkv7InputsForward<Element>& args, cudaStream_t stream) {
  return args.sizes.tokens == 0 ? cudaSuccess
                                : launch_for_head(&wkv7_inputs_kernel<Element, 1>,
                                                  &wkv7_inputs_kernel<Element, 2>,
                                                  &wkv7_inputs_kernel<Element, 4>,
                                                  args,
                                                  stream);
}

template <typename Element>
cudaError_t launch_wkv7_inputs_backward(const Wkv7InputsBackward<Element>& args,
                                        cudaStream_t stream) {
  if (args.sizes.tokens > 0) {
    const cudaError_t error = launch_for_head(&wkv7_inputs_backward_kernel<Element, 1>,
                                              &wkv7_inputs_backward_kernel<Element, 2>,
                                              &wkv7_inputs_backward_kernel<Element, 4>,
                                              args,
                                              stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const int64_t n_embd = args.sizes.H * args.sizes.N;
  return launch_column_sum<Element>(args.scratch,
                                    num_strips(args.sizes),
                                    {.data = {args.dk_k, args.dk_a}, .columns = {n_embd, n_embd}},
                                    stream);
}

template <typename Element>
cudaError_t launch_wkv7_output(const Wkv7OutputForward<Element>& args, cudaStream_t stream) {
  return args.sizes.tokens == 0 ? cudaSuccess
                                : launch_for_head(&wkv7_output_kernel<Element, 1>,
                                                  &wkv7_output_kernel<Element, 2>,
                                                  &wkv7_output_kernel<Element, 4>,
                                                  args,
                                                  stream);
}

template <typename Element>
cudaError_t launch_wkv7_output_backward(const Wkv7OutputBackward<Element>& args,
                                        cudaStream_t stream) {
  if (args.sizes.tokens > 0) {
    const cudaError_t error = launch_for_head(&wkv7_output_backward_kernel<Element, 1>,
                                              &wkv7_output_backward_kernel<Element, 2>,
                                              &wkv7_output_backward_kernel<Element, 4>,
                                              args,
                                              stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  const int64_t n_embd = args.sizes.H * args.sizes.N;
  return launch_column_sum<Element>(
      args.scratch,
      num_strips(args.sizes),
      {.data = {args.dr_k, args.dweight, args.dbias}, .columns = {n_embd, n_embd, n_embd}},
      stream);
}

#define RWKV_INSTANTIATE(Element)                                                           \
  template cudaError_t launch_wkv7_inputs(const Wkv7InputsForward<Element>&, cudaStream_t); \
  template cudaError_t launch_wkv7_inputs_backward(const Wkv7InputsBackward<Element>&,      \
                                                   cudaStream_t);                           \
  template cudaError_t launch_wkv7_output(const Wkv7OutputForward<Element>&, cudaStream_t); \
  template cudaError_t launch_wkv7_output_backward(const Wkv7OutputBackward<Element>&,      \
                                                   cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
