// layer_norm_shift_mix, forward. Source and equations: model/ops/layer_norm_shift_mix.h; launch
// shape: layer_norm_shift_mix_row.cuh. Everything between loads and stores is fp32; s is rounded to
// the element type before it is normalised.
//
// A block walks up its tokens and keeps n of the token before. In rows of whole vectors it takes
// four tokens at a time: their loads are in flight together, and they share one barrier; in any
// other row one. The variance is that about the mean: each warp's own, then merged exactly. Floor,
// bytes an element in bf16, J mixes: 4 + 2 J (2 + 2 J without delta). Registers on sm_90 in bf16:
// 128, so 16 warps a multiprocessor, of five blocks at C 768 and two at C 2048.
#include "cuda/layer_norm_shift_mix_row.cuh"

namespace rwkv {
namespace layer_norm_shift_mix {
namespace {

template <bool kVectors>
constexpr int kTokensAtOnce = kVectors ? 4 : 1;

__device__ __forceinline__ float mix_with(float before, float n, float mu) {
  return fmaf(mu, n - before, before);
}

template <typename Element, bool kVectors>
struct ForwardWalk {
  const LayerNormShiftMixForward<Element>& a;
  Channels<kVectors> channels;
  Row<Element, kVectors> weight;
  Row<Element, kVectors> bias;
  float before[kPerThread];  // n of the token before
  int step = 0;

  // s of some tokens from `token` on; that of own ones is stored.
  template <int kTokens>
  __device__ __forceinline__ void load_sums(int64_t token,
                                            int64_t begin,
                                            float (&s)[kTokens][kPerThread]) const {
    const int64_t n_embd = a.sizes.n_embd;
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      channels.load(a.x + (token + k) * n_embd, s[k]);
    }
    if (a.delta == nullptr) {
      return;
    }
    float delta[kTokens][kPerThread];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      channels.load(a.delta + (token + k) * n_embd, delta[k]);
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        s[k][i] = to_float(from_float<Element>(s[k][i] + delta[k][i]));
      }
      if (token + k >= begin) {
        channels.store(a.sum + (token + k) * n_embd, s[k]);
      }
    }
  }

  template <int kTokens>
  __device__ __forceinline__ void compute_statistics(const float (&s)[kTokens][kPerThread],
                                                     Statistics (&statistics)[kTokens]) {
    const int64_t n_embd = a.sizes.n_embd;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    WarpPairs* const shared = pairs_of_step<kTokensAtOnce<kVectors>>(step++);
    const float own_count = warp_channels(n_embd, warp);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        sum += channels.owns(i) ? s[k][i] : 0.0f;
      }
      const float mean = warp_sum(sum) / own_count;
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const float centred = channels.owns(i) ? s[k][i] - mean : 0.0f;
        squares = fmaf(centred, centred, squares);
      }
      squares = warp_sum(squares);
      if (threadIdx.x % kWarpSize == 0) {
        shared[k].pairs[warp] = make_float2(mean, squares);
      }
    }
    __syncthreads();
    const float scale = 1.0f / static_cast<float>(n_embd);
    float squares[kTokens] = {};
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      statistics[k].mean = 0.0f;
    }
    for (int w = 0; w < warps; ++w) {
      const float share = warp_channels(n_embd, w) * scale;
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        statistics[k].mean = fmaf(share, shared[k].pairs[w].x, statistics[k].mean);
      }
    }
    for (int w = 0; w < warps; ++w) {
      const float count = warp_channels(n_embd, w);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const float2 pair = shared[k].pairs[w];
        const float apart = pair.x - statistics[k].mean;
        squares[k] += fmaf(count * apart, apart, pair.y);
      }
    }
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      statistics[k].rstd = reciprocal_sqrt(fmaf(squares[k], scale, a.eps));
    }
  }

  // Tokens token, token + 1, ... of one row of the batch; those before `begin` are only normalised.
  template <int kTokens>
  __device__ __forceinline__ void walk(int64_t token, int64_t begin) {
    const int64_t n_embd = a.sizes.n_embd;
    float n[kTokens][kPerThread];  // s at first
    load_sums(token, begin, n);
    Statistics statistics[kTokens];
    compute_statistics(n, statistics);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (token + k >= begin) {
          a.statistics[2 * (token + k)] = statistics[k].mean;
          a.statistics[2 * (token + k) + 1] = statistics[k].rstd;
        }
      }
    }
    float own_weight[kPerThread], own_bias[kPerThread];
    weight.get(channels, a.weight, own_weight);
    bias.get(channels, a.bias, own_bias);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        n[k][i] = fmaf(standardise(n[k][i], statistics[k]), own_weight[i], own_bias[i]);
      }
    }
    if (a.sizes.num_mixes == 0) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        channels.store(a.mixed[0] + (token + k) * n_embd, n[k]);
      }
      return;
    }
    for (int j = 0; j < a.sizes.num_mixes; ++j) {
      float mu[kPerThread];
      channels.load(a.mix + j * n_embd, mu);
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        if (token + k >= begin) {
          float mixed[kPerThread];
#pragma unroll
          for (int i = 0; i < kPerThread; ++i) {
            mixed[i] = mix_with(k == 0 ? before[i] : n[k == 0 ? 0 : k - 1][i], n[k][i], mu[i]);
          }
          channels.store(a.mixed[j] + (token + k) * n_embd, mixed);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      before[i] = n[kTokens - 1][i];
    }
  }
};

template <typename Element, bool kVectors>
__global__ void __launch_bounds__(kVectors ? kVectorThreads : kMaxWarps* kWarpSize)
    layer_norm_shift_mix_kernel(const LayerNormShiftMixForward<Element> a, bool vectors) {
  constexpr int kTokens = kTokensAtOnce<kVectors>;
  const int64_t n_embd = a.sizes.n_embd;
  const Channels<kVectors> channels(n_embd, vectors);
  ForwardWalk<Element, kVectors> walk{.a = a,
                                      .channels = channels,
                                      .weight = Row<Element, kVectors>(channels, a.weight),
                                      .bias = Row<Element, kVectors>(channels, a.bias),
                                      .before = {}};
  const bool shifts = a.sizes.num_mixes > 0;
  const Tokens tokens = own_tokens(a.sizes.batch_size * a.sizes.seq_len);
  int64_t begin = tokens.begin;
  while (begin < tokens.end) {
    const int64_t row = begin / a.sizes.seq_len;
    const int64_t row_end = (row + 1) * a.sizes.seq_len;
    const int64_t end = row_end < tokens.end ? row_end : tokens.end;
    int64_t token = begin;
    if (shifts) {
      if (begin == row_end - a.sizes.seq_len) {
        channels.load(a.carry + row * n_embd, walk.before);
      } else {
        --token;
      }
    }
    for (; token + kTokens <= end; token += kTokens) {
      walk.template walk<kTokens>(token, begin);
    }
    if constexpr (kTokens > 1) {
      for (; token < end; ++token) {
        walk.template walk<1>(token, begin);
      }
    }
    if (shifts && end == row_end) {
      channels.store(a.last + row * n_embd, walk.before);
    }
    begin = end;
  }
}

}  // namespace
}  // namespace layer_norm_shift_mix

template <typename Element>
cudaError_t launch_layer_norm_shift_mix(const LayerNormShiftMixForward<Element>& arguments,
                                        cudaStream_t stream) {
  using namespace layer_norm_shift_mix;
  const auto& a = arguments;
  if (is_empty(a.sizes)) {
    return cudaSuccess;
  }
  if (!is_valid(a.sizes)) {
    return cudaErrorInvalidValue;
  }
  int64_t blocks = 0;
  const cudaError_t error = num_blocks(a.sizes, &blocks);
  if (error != cudaSuccess) {
    return error;
  }
  const bool vectors = are_vectors(
      a.sizes, {a.x, a.delta, a.weight, a.bias, a.carry, a.mix, a.sum, a.last}, a.mixed);
  if (vectors && threads_of(a.sizes) <= kVectorThreads) {
    return launch_kernel(&layer_norm_shift_mix_kernel<Element, true>,
                         shape_of(a.sizes, blocks, kTokensAtOnce<true>),
                         stream,
                         a,
                         vectors);
  }
  return launch_kernel(&layer_norm_shift_mix_kernel<Element, false>,
                       shape_of(a.sizes, blocks, kTokensAtOnce<false>),
                       stream,
                       a,
                       vectors);
}

#define RWKV_INSTANTIATE(Element)                                                            \
  template cudaError_t launch_layer_norm_shift_mix(const LayerNormShiftMixForward<Element>&, \
                                                   cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
