// layer_norm_shift_mix, backward. Source and equations: model/ops/layer_norm_shift_mix.h; launch
// shape: layer_norm_shift_mix_row.cuh. Everything between loads and stores is fp32.
//
// A block walks down its tokens and keeps what the token after sends back, and xhat, which both
// tokens of a difference need. In rows of whole vectors it takes one token at a time (two for
// LayerNorm alone), and keeps the sums of its tokens, (2 + J) * 8 numbers a thread, in registers;
// in any other row it adds to its row of scratch and loads anew what the other kernel keeps. Floor,
// bytes an element in bf16, J mixes: 6 + 2 J with dsum. The sums of the blocks are (2 + J) * 4
// bytes for each channel and block on top, and mostly stay in the second-level cache. Registers on
// sm_90 in bf16 with J <= 3: 128, so 16 warps a multiprocessor, of five blocks at C 768 and two at
// C 2048.
#include "cuda/column_sum_kernel.h"
#include "cuda/layer_norm_shift_mix_row.cuh"

namespace rwkv {
namespace layer_norm_shift_mix {
namespace {

constexpr int kAnyMixes = -1;
template <int kMixes>
constexpr int kTokensAtOnce = kMixes == 0 ? 2 : 1;

// Threads of the largest block; in fp32 or with J > 3 the sums leave registers for fewer.
constexpr int kManySumsThreads = 256;
template <typename Element, int kMixes>
constexpr int kMaxThreads = kMixes == kAnyMixes                   ? kMaxWarps* kWarpSize
                            : sizeof(Element) == 2 && kMixes <= 3 ? kVectorThreads
                                                                  : kManySumsThreads;

// Sums over a block's tokens: rows dweight, dbias, dmix_0, ... of its own channels.
template <int kMixes>
class ParameterSums {
 public:
  template <typename Channels>
  __device__ __forceinline__ ParameterSums(const Channels&, float*, int64_t, int) {}
  template <typename Channels>
  __device__ __forceinline__ void add_products(const Channels&,
                                               int row,
                                               const float (&x)[kPerThread],
                                               const float (&y)[kPerThread]) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      sums_[row][i] = fmaf(x[i], y[i], sums_[row][i]);
    }
  }
  template <typename Channels>
  __device__ __forceinline__ void store(const Channels& channels, float* rows, int64_t n_embd) {
#pragma unroll
    for (int row = 0; row < 2 + kMixes; ++row) {
      channels.store(rows + row * n_embd, sums_[row]);
    }
  }

 private:
  float sums_[2 + kMixes][kPerThread] = {};
};
// In memory: the registers would not hold them.
template <>
class ParameterSums<kAnyMixes> {
 public:
  template <typename Channels>
  __device__ __forceinline__
  ParameterSums(const Channels& channels, float* rows, int64_t n_embd, int num_mixes)
      : rows_(rows), n_embd_(n_embd) {
    const float zeros[kPerThread] = {};
    for (int row = 0; row < 2 + num_mixes; ++row) {
      channels.store(rows + row * n_embd, zeros);
    }
  }
  template <typename Channels>
  __device__ __forceinline__ void add_products(const Channels& channels,
                                               int row,
                                               const float (&x)[kPerThread],
                                               const float (&y)[kPerThread]) {
    float sums[kPerThread];
    channels.load(rows_ + row * n_embd_, sums);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      sums[i] = fmaf(x[i], y[i], sums[i]);
    }
    channels.store(rows_ + row * n_embd_, sums);
  }
  template <typename Channels>
  __device__ __forceinline__ void store(const Channels&, float*, int64_t) {}

 private:
  float* rows_;
  int64_t n_embd_;
};

template <typename Element, int kMixes>
struct BackwardWalk {
  static constexpr bool kVectors = kMixes != kAnyMixes;

  const LayerNormShiftMixBackward<Element>& a;
  Channels<kVectors> channels;
  ParameterSums<kMixes> sums;
  Row<Element, kVectors> weight;
  float xhat[kPerThread];   // of the token that comes next
  float later[kPerThread];  // what the token after it sends back
  int step = 0;

  __device__ __forceinline__ int num_mixes() const { return kVectors ? kMixes : a.sizes.num_mixes; }
  __device__ __forceinline__ Statistics statistics(int64_t token) const {
    return {a.statistics[2 * token], a.statistics[2 * token + 1]};
  }

  // What a token, or the end of a row of the batch, sends back to the token before it.
  __device__ __forceinline__ void gather_later(int64_t token,
                                               int64_t row,
                                               float (&x)[kPerThread]) const {
    const int64_t n_embd = a.sizes.n_embd;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      x[i] = 0.0f;
    }
    if (num_mixes() > 0 && token < (row + 1) * a.sizes.seq_len) {
#pragma unroll 1
      for (int j = 0; j < num_mixes(); ++j) {
        float g[kPerThread], mu[kPerThread];
        channels.load(a.dmixed[j] + token * n_embd, g);
        channels.load(a.mix + j * n_embd, mu);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          x[i] = fmaf(1.0f - mu[i], g[i], x[i]);
        }
      }
    } else if (num_mixes() > 0 && a.dlast != nullptr) {
      channels.load(a.dlast + row * n_embd, x);
    }
  }

  // Before the tokens below `end` of a row of the batch.
  __device__ __forceinline__ void start(int64_t end, int64_t row) {
    if constexpr (kVectors) {
      gather_later(end, row, later);
      channels.load(a.sum + (end - 1) * a.sizes.n_embd, xhat);
      standardise_row(statistics(end - 1), xhat);
    }
  }
  // Behind the first token of a row of the batch.
  __device__ __forceinline__ void store_dcarry(int64_t row) {
    if constexpr (!kVectors) {
      gather_later(row * a.sizes.seq_len, row, later);
    }
    channels.store(a.dcarry + row * a.sizes.n_embd, later);
  }

  __device__ __forceinline__ static void standardise_row(Statistics statistics,
                                                         float (&row)[kPerThread]) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      row[i] = standardise(row[i], statistics);
    }
  }

  // n minus the carried row, at the first token of a row of the batch, from its xhat.
  __device__ __forceinline__ void difference_to_carry(int64_t row,
                                                      const float (&x)[kPerThread],
                                                      float (&difference)[kPerThread]) const {
    float own_weight[kPerThread], bias[kPerThread], carry[kPerThread];
    weight.get(channels, a.weight, own_weight);
    channels.load(a.bias, bias);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      difference[i] = fmaf(x[i], own_weight[i], bias[i]);
    }
    // Last, when weight and bias have left their registers.
    channels.load(a.carry + row * a.sizes.n_embd, carry);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      difference[i] -= carry[i];
    }
  }

  // Tokens token, token - 1, ... of one row of the batch, of which the last may be its first.
  template <int kTokens>
  __device__ __forceinline__ void walk(int64_t token, int64_t row) {
    const int64_t n_embd = a.sizes.n_embd;
    constexpr int kGradients = kMixes > 0 ? kMixes : 1;
    const bool at_start = token - kTokens + 1 == row * a.sizes.seq_len;

    // Loads first. xhat of the token before the first is of no use, and may not be there.
    Packed8<Element> gradients[kTokens][kGradients], s_before[kTokens], dsum[kTokens];
    if constexpr (kVectors) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        const int64_t at = (token - k) * n_embd;
        const bool first = k == kTokens - 1 && at_start;
        s_before[k] = channels.load_packed(a.sum + (first ? at : at - n_embd));
#pragma unroll
        for (int j = 0; j < kGradients; ++j) {
          gradients[k][j] = channels.load_packed(a.dmixed[j] + at);
        }
      }
    }

    float scaled[kTokens][kPerThread];  // gn weight
    float xhats[kTokens][kPerThread];
    float2 row_sums[kTokens];
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int64_t at = (token - k) * n_embd;
      const bool first = k == kTokens - 1 && at_start;
      // The mixes' sums first, for differences are then out of the way.
      float x[kPerThread];
      get_xhat(token - k, xhat, x);
      float own_weight[kPerThread];
      weight.get(channels, a.weight, own_weight);
      float before[kPerThread] = {};
      float difference[kPerThread];
      if (first) {
        if (num_mixes() > 0) {
          difference_to_carry(row, x, difference);
        }
      } else {
        if constexpr (kVectors) {
          unpack(s_before[k], before);
        } else {
          channels.load(a.sum + at - n_embd, before);
        }
        standardise_row(statistics(token - k - 1), before);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          difference[i] = own_weight[i] * (x[i] - before[i]);
        }
      }
#pragma unroll(kVectors ? kMaxMixes : 1)
      for (int j = 0; j < num_mixes(); ++j) {
        float g[kPerThread];
        load_gradient(gradients[k][kVectors ? j : 0], a.dmixed[j] + at, g);
        sums.add_products(channels, 2 + j, g, difference);
      }

      // What the token after sent back, then what goes to the token before.
      float gn[kPerThread];
      if (num_mixes() == 0) {
        load_gradient(gradients[k][0], a.dmixed[0] + at, gn);
      } else if constexpr (kVectors) {
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          gn[i] = later[i];
          later[i] = 0.0f;
        }
      } else {
        gather_later(token - k + 1, row, gn);
      }
#pragma unroll(kVectors ? kMaxMixes : 1)
      for (int j = 0; j < num_mixes(); ++j) {
        float g[kPerThread], mu[kPerThread];
        load_gradient(gradients[k][kVectors ? j : 0], a.dmixed[j] + at, g);
        channels.load(a.mix + j * n_embd, mu);
#pragma unroll
        for (int i = 0; i < kPerThread; ++i) {
          gn[i] = fmaf(mu[i], g[i], gn[i]);
          if constexpr (kVectors) {
            later[i] = fmaf(1.0f - mu[i], g[i], later[i]);
          }
        }
      }
      const float ones[kPerThread] = {1, 1, 1, 1, 1, 1, 1, 1};
      get_xhat(token - k, xhat, x);
      sums.add_products(channels, 0, gn, x);
      sums.add_products(channels, 1, gn, ones);
      row_sums[k] = make_float2(0.0f, 0.0f);
      weight.get(channels, a.weight, own_weight);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        scaled[k][i] = gn[i] * own_weight[i];
        row_sums[k].x += scaled[k][i];
        row_sums[k].y = fmaf(scaled[k][i], x[i], row_sums[k].y);
        xhats[k][i] = x[i];
        xhat[i] = before[i];
      }
    }

    // On their way while the block waits; registers for them are free only now.
    if constexpr (kVectors) {
      if (a.dsum != nullptr) {
#pragma unroll
        for (int k = 0; k < kTokens; ++k) {
          dsum[k] = channels.load_packed(a.dsum + (token - k) * n_embd);
        }
      }
    }
    average(row_sums);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const int64_t at = (token - k) * n_embd;
      const float rstd = a.statistics[2 * (token - k) + 1];
      float x[kPerThread];
      get_xhat(token - k, xhats[k], x);
      float ds[kPerThread] = {};
      if (a.dsum != nullptr) {
        load_gradient(dsum[k], a.dsum + at, ds);
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const float centred = fmaf(-x[i], row_sums[k].y, scaled[k][i] - row_sums[k].x);
        ds[i] = fmaf(rstd, centred, ds[i]);
      }
      channels.store(a.ds + at, ds);
    }
  }

  // xhat of a token: kept or, where registers are few, from the first-level cache.
  __device__ __forceinline__ void get_xhat(int64_t token,
                                           const float (&kept)[kPerThread],
                                           float (&x)[kPerThread]) const {
    if constexpr (kVectors) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        x[i] = kept[i];
      }
    } else {
      channels.load(a.sum + token * a.sizes.n_embd, x);
      standardise_row(statistics(token), x);
    }
  }

  // From what has been loaded before, or now.
  __device__ __forceinline__ void load_gradient(const Packed8<Element>& packed,
                                                const Element* from,
                                                float (&x)[kPerThread]) const {
    if constexpr (kVectors) {
      unpack(packed, x);
    } else {
      channels.load(from, x);
    }
  }

  // Sums of threads to averages over the row.
  template <int kTokens>
  __device__ __forceinline__ void average(float2 (&sums_of_thread)[kTokens]) {
    // Unsigned: one instruction that may be repeated, no register kept.
    const unsigned warp = threadIdx.x / kWarpSize;
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    WarpPairs* const shared = pairs_of_step<kTokensAtOnce<kMixes>>(step++);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      const float2 pair = make_float2(warp_sum(sums_of_thread[k].x), warp_sum(sums_of_thread[k].y));
      if (threadIdx.x % kWarpSize == 0) {
        shared[k].pairs[warp] = pair;
      }
      sums_of_thread[k] = make_float2(0.0f, 0.0f);
    }
    __syncthreads();
    // Unrolled, it would spill.
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
#pragma unroll
      for (int k = 0; k < kTokens; ++k) {
        sums_of_thread[k].x += shared[k].pairs[w].x;
        sums_of_thread[k].y += shared[k].pairs[w].y;
      }
    }
    const float scale = 1.0f / static_cast<float>(a.sizes.n_embd);
#pragma unroll
    for (int k = 0; k < kTokens; ++k) {
      sums_of_thread[k].x *= scale;
      sums_of_thread[k].y *= scale;
    }
  }
};

template <typename Element, int kMixes>
__global__ void __launch_bounds__(kMaxThreads<Element, kMixes>, 1)
    layer_norm_shift_mix_backward_kernel(const LayerNormShiftMixBackward<Element> a, bool vectors) {
  using Walk = BackwardWalk<Element, kMixes>;
  constexpr int kTokens = kTokensAtOnce<kMixes>;
  const int64_t n_embd = a.sizes.n_embd;
  const Channels<Walk::kVectors> channels(n_embd, vectors);
  float* const rows = a.scratch + blockIdx.x * (2 + a.sizes.num_mixes) * n_embd;
  Walk walk{.a = a,
            .channels = channels,
            .sums = ParameterSums<kMixes>(channels, rows, n_embd, a.sizes.num_mixes),
            .weight = Row<Element, Walk::kVectors>(channels, a.weight),
            .xhat = {},
            .later = {}};
  const Tokens tokens = own_tokens(a.sizes.batch_size * a.sizes.seq_len);
  int64_t token = tokens.end - 1;
  while (token >= tokens.begin) {
    const int64_t row = token / a.sizes.seq_len;
    const int64_t row_begin = row * a.sizes.seq_len;
    const int64_t begin = row_begin > tokens.begin ? row_begin : tokens.begin;
    walk.start(token + 1, row);
    for (; token - kTokens + 1 >= begin; token -= kTokens) {
      walk.template walk<kTokens>(token, row);
    }
    if constexpr (kTokens > 1) {
      for (; token >= begin; --token) {
        walk.template walk<1>(token, row);
      }
    }
    if (a.sizes.num_mixes > 0 && begin == row_begin) {
      walk.store_dcarry(row);
    }
  }
  walk.sums.store(channels, rows, n_embd);
}

// ---- Launching ----------------------------------------------------------------------------------

template <typename Element, int kMixes>
cudaError_t launch_backward_of(const LayerNormShiftMixBackward<Element>& a,
                               int64_t blocks,
                               bool vectors,
                               cudaStream_t stream) {
  if (vectors && threads_of(a.sizes) <= kMaxThreads<Element, kMixes>) {
    return launch_kernel(&layer_norm_shift_mix_backward_kernel<Element, kMixes>,
                         shape_of(a.sizes, blocks, kTokensAtOnce<kMixes>),
                         stream,
                         a,
                         vectors);
  }
  return launch_kernel(&layer_norm_shift_mix_backward_kernel<Element, kAnyMixes>,
                       shape_of(a.sizes, blocks, kTokensAtOnce<kAnyMixes>),
                       stream,
                       a,
                       vectors);
}

template <typename Element>
using BackwardLauncher =
    cudaError_t (*)(const LayerNormShiftMixBackward<Element>&, int64_t, bool, cudaStream_t);
template <typename Element>
constexpr BackwardLauncher<Element> kBackwardLaunchers[kMaxMixes + 1] = {
    &launch_backward_of<Element, 0>,
    &launch_backward_of<Element, 1>,
    &launch_backward_of<Element, 2>,
    &launch_backward_of<Element, 3>,
    &launch_backward_of<Element, 4>,
    &launch_backward_of<Element, 5>,
    &launch_backward_of<Element, 6>};

}  // namespace
}  // namespace layer_norm_shift_mix

template <typename Element>
cudaError_t launch_layer_norm_shift_mix_backward(
    const LayerNormShiftMixBackward<Element>& arguments, cudaStream_t stream) {
  using namespace layer_norm_shift_mix;
  const auto& a = arguments;
  if (is_empty(a.sizes)) {
    return cudaSuccess;
  }
  if (!is_valid(a.sizes)) {
    return cudaErrorInvalidValue;
  }
  int64_t blocks = 0;
  cudaError_t error = num_blocks(a.sizes, &blocks);
  if (error != cudaSuccess) {
    return error;
  }
  const bool vectors = are_vectors(
      a.sizes,
      {a.sum, a.weight, a.bias, a.carry, a.mix, a.dsum, a.dlast, a.ds, a.dcarry, a.scratch},
      a.dmixed);
  error = kBackwardLaunchers<Element>[a.sizes.num_mixes](a, blocks, vectors, stream);
  if (error != cudaSuccess) {
    return error;
  }
  return launch_column_sum<Element>(
      a.scratch,
      blocks,
      {.data = {a.dweight, a.dbias, a.dmix},
       .columns = {a.sizes.n_embd, a.sizes.n_embd, a.sizes.num_mixes * a.sizes.n_embd}},
      stream);
}

int64_t layer_norm_shift_mix_scratch_size(const LayerNormShiftMixSizes& sizes) {
  using namespace layer_norm_shift_mix;
  int64_t blocks = 0;
  if (is_empty(sizes) || num_blocks(sizes, &blocks) != cudaSuccess) {
    return 0;
  }
  return blocks * (2 + sizes.num_mixes) * sizes.n_embd;
}

#define RWKV_INSTANTIATE(Element)                            \
  template cudaError_t launch_layer_norm_shift_mix_backward( \
      const LayerNormShiftMixBackward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
