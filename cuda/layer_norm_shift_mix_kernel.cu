// layer_norm_shift_mix, forward and backward. Source and equations:
// model/ops/layer_norm_shift_mix.h. Everything between loads and stores is fp32; s is rounded to
// the element type before it is normalised.
//
// Launch shape: a thread owns eight neighbouring channels (one 16-byte access a row in bf16), a
// block the whole row, C / 8 threads; so a block walks tokens, and what the next token needs stays
// in registers. The B * T tokens, rows of the batch one behind the other, are dealt out evenly to
// as many blocks as are resident at once: a block's tokens are neighbours, and it reads one row
// more than it has. Two kernels each way:
//   - for rows of whole 16-byte vectors. Forward takes four tokens at a time: their loads are in
//     flight together, and they share one barrier. Backward takes one (two for LayerNorm alone),
//     and keeps the sums of its tokens, (2 + J) * 8 numbers a thread, in registers;
//   - for any other row: one token at a time, registers for a block of 1,024 threads. Backward adds
//     to its row of scratch and loads anew what the other kernel keeps.
// Forward walks up and keeps n of the token before; backward walks down and keeps what the token
// after sends back, and xhat, which both tokens of a difference need. Row sums go through shuffles
// and two buffers in shared memory: one barrier a step, for whoever writes a buffer again has
// passed the barrier behind its last reading. The variance is that about the mean: each warp's own,
// then merged exactly. Floor, bytes an element in bf16, J mixes: forward 4 + 2 J (2 + 2 J without
// delta), backward 6 + 2 J with dsum. The sums of backward's blocks are (2 + J) * 4 bytes for each
// channel and block on top, and mostly stay in the second-level cache. Registers on sm_90 in bf16:
// forward 128, backward with J <= 3 128: 16 warps a multiprocessor, of five blocks at C 768 and two
// at C 2048.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "cuda/column_sum_kernel.h"
#include "cuda/launch.h"
#include "cuda/layer_norm_shift_mix_kernel.h"
#include "cuda/packed.cuh"

namespace rwkv {
namespace {

constexpr int kPerThread = 8;
constexpr int kPerWarp = kPerThread * kWarpSize;
constexpr int kMaxWarps = kMaxChannels / kPerWarp;

// Threads of the largest block of a kernel for whole vectors: with these, its registers suffice.
constexpr int kVectorThreads = 512;
constexpr int kManySumsThreads = 256;  // backward in fp32 or with J > 3
// Threads that are resident on a multiprocessor with 128 registers each.
constexpr int kResidentThreads = 512;

constexpr int kAnyMixes = -1;
template <bool kVectors>
constexpr int kForwardTokens = kVectors ? 4 : 1;
template <int kMixes>
constexpr int kBackwardTokens = kMixes == 0 ? 2 : 1;
template <typename Element, int kMixes>
constexpr int kBackwardThreads = kMixes == kAnyMixes                   ? kMaxWarps* kWarpSize
                                 : sizeof(Element) == 2 && kMixes <= 3 ? kVectorThreads
                                                                       : kManySumsThreads;

// ---- A thread's channels ------------------------------------------------------------------------

// kVectors: rows are whole vectors. Threads beyond the row's end then read its beginning, so that
// no load stands behind a branch, and own nothing.
template <bool kVectors>
class Channels {
 public:
  __device__ __forceinline__ Channels(int64_t n_embd, bool vectors)
      : first_(threadIdx.x * kPerThread),
        count_(static_cast<int>(n_embd) - static_cast<int>(first_)),
        vectors_(vectors && count_ >= kPerThread) {}

  __device__ __forceinline__ bool owns(int i) const { return i < count_; }

  template <typename Element>
  __device__ __forceinline__ void load(const Element* row, float (&x)[kPerThread]) const {
    if (kVectors || vectors_) {
      load8(row + (count_ > 0 ? first_ : 0u), x);
    } else {
      load_first(row + first_, count_, x);
    }
  }
  template <typename Element>
  __device__ __forceinline__ Packed8<Element> load_packed(const Element* row) const {
    return load_packed8(row + (count_ > 0 ? first_ : 0u));
  }
  template <typename Element>
  __device__ __forceinline__ void store(Element* row, const float (&x)[kPerThread]) const {
    if (kVectors ? count_ > 0 : vectors_) {
      store8(row + first_, x);
    } else if (!kVectors) {
      store_first(row + first_, count_, x);
    }
  }

 private:
  // Unsigned: as an offset into memory, too, it is one register.
  uint32_t first_;
  int count_;  // channels from the first to the row's end
  bool vectors_;
};

// A thread's part of a row that every token needs: kept packed or, in rows that are no whole
// vectors, loaded whenever it is used. Threads that own nothing have zeros.
template <typename Element, bool kVectors>
class Row {
 public:
  __device__ __forceinline__ Row(const Channels<kVectors>& channels, const Element* row) {
    if (channels.owns(0)) {
      packed_ = channels.load_packed(row);
    }
  }
  __device__ __forceinline__ void get(const Channels<kVectors>&,
                                      const Element*,
                                      float (&x)[kPerThread]) const {
    unpack(packed_, x);
  }

 private:
  Packed8<Element> packed_ = {};
};
template <typename Element>
class Row<Element, false> {
 public:
  __device__ __forceinline__ Row(const Channels<false>&, const Element*) {}
  __device__ __forceinline__ void get(const Channels<false>& channels,
                                      const Element* row,
                                      float (&x)[kPerThread]) const {
    channels.load(row, x);
  }
};

// The number of channels that a warp owns.
__device__ __forceinline__ float warp_channels(int64_t n_embd, int warp) {
  const int64_t left = n_embd - static_cast<int64_t>(warp) * kPerWarp;
  return static_cast<float>(left < kPerWarp ? left : kPerWarp);
}

// The tokens of this block.
struct Tokens {
  int64_t begin, end;
};
__device__ __forceinline__ Tokens own_tokens(int64_t num_tokens) {
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  return {block * num_tokens / blocks, (block + 1) * num_tokens / blocks};
}

// Two numbers of each warp for each of a step's tokens; steps take turns.
struct WarpPairs {
  float2 pairs[kMaxWarps];
};
template <int kTokens>
__device__ __forceinline__ WarpPairs* pairs_of_step(int step) {
  return static_cast<WarpPairs*>(shared_memory()) + step % 2 * kTokens;
}

// ---- The maths of a token, the same bits wherever it is called ----------------------------------

struct Statistics {
  float mean, rstd;
};

__device__ __forceinline__ float standardise(float s, Statistics statistics) {
  return (s - statistics.mean) * statistics.rstd;
}
__device__ __forceinline__ float mix_with(float before, float n, float mu) {
  return fmaf(mu, n - before, before);
}

// ---- Forward ------------------------------------------------------------------------------------

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
    WarpPairs* const shared = pairs_of_step<kForwardTokens<kVectors>>(step++);
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
  constexpr int kTokens = kForwardTokens<kVectors>;
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

// ---- Backward -----------------------------------------------------------------------------------

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
    WarpPairs* const shared = pairs_of_step<kBackwardTokens<kMixes>>(step++);
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
__global__ void __launch_bounds__(kBackwardThreads<Element, kMixes>, 1)
    layer_norm_shift_mix_backward_kernel(const LayerNormShiftMixBackward<Element> a, bool vectors) {
  using Walk = BackwardWalk<Element, kMixes>;
  constexpr int kTokens = kBackwardTokens<kMixes>;
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

// ---- Launchers ----------------------------------------------------------------------------------

bool is_empty(const LayerNormShiftMixSizes& sizes) {
  return sizes.batch_size == 0 || sizes.seq_len == 0 || sizes.n_embd == 0;
}
bool is_valid(const LayerNormShiftMixSizes& sizes) {
  return sizes.num_mixes >= 0 && sizes.num_mixes <= kMaxMixes && sizes.n_embd <= kMaxChannels;
}

int threads_of(const LayerNormShiftMixSizes& sizes) {
  return static_cast<int>(ceil_div(sizes.n_embd, kPerWarp)) * kWarpSize;
}

// As many blocks as are resident at once, but no fewer than four tokens for each.
cudaError_t num_blocks(const LayerNormShiftMixSizes& sizes, int64_t* blocks) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t resident =
      int64_t{multiprocessors} * std::max(1, kResidentThreads / threads_of(sizes));
  *blocks = std::min(resident, ceil_div(sizes.batch_size * sizes.seq_len, 4));
  return error;
}

LaunchShape shape_of(const LayerNormShiftMixSizes& sizes, int64_t blocks, int tokens) {
  return {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(static_cast<unsigned>(threads_of(sizes))),
          .shared_bytes = 2 * static_cast<size_t>(tokens) * sizeof(WarpPairs)};
}

bool are_vectors(const LayerNormShiftMixSizes& sizes,
                 std::initializer_list<const void*> pointers,
                 const auto& more) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  for (const void* pointer : more) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return sizes.n_embd % kPerThread == 0 && bits % 16 == 0;
}

template <typename Element, int kMixes>
cudaError_t launch_backward_of(const LayerNormShiftMixBackward<Element>& a,
                               int64_t blocks,
                               bool vectors,
                               cudaStream_t stream) {
  if (vectors && threads_of(a.sizes) <= kBackwardThreads<Element, kMixes>) {
    return launch_kernel(&layer_norm_shift_mix_backward_kernel<Element, kMixes>,
                         shape_of(a.sizes, blocks, kBackwardTokens<kMixes>),
                         stream,
                         a,
                         vectors);
  }
  return launch_kernel(&layer_norm_shift_mix_backward_kernel<Element, kAnyMixes>,
                       shape_of(a.sizes, blocks, kBackwardTokens<kAnyMixes>),
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

template <typename Element>
cudaError_t launch_layer_norm_shift_mix(const LayerNormShiftMixForward<Element>& arguments,
                                        cudaStream_t stream) {
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
                         shape_of(a.sizes, blocks, kForwardTokens<true>),
                         stream,
                         a,
                         vectors);
  }
  return launch_kernel(&layer_norm_shift_mix_kernel<Element, false>,
                       shape_of(a.sizes, blocks, kForwardTokens<false>),
                       stream,
                       a,
                       vectors);
}

template <typename Element>
cudaError_t launch_layer_norm_shift_mix_backward(
    const LayerNormShiftMixBackward<Element>& arguments, cudaStream_t stream) {
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
  int64_t blocks = 0;
  if (is_empty(sizes) || num_blocks(sizes, &blocks) != cudaSuccess) {
    return 0;
  }
  return blocks * (2 + sizes.num_mixes) * sizes.n_embd;
}

#define RWKV_INSTANTIATE(Element)                                                            \
  template cudaError_t launch_layer_norm_shift_mix(const LayerNormShiftMixForward<Element>&, \
                                                   cudaStream_t);                            \
  template cudaError_t launch_layer_norm_shift_mix_backward(                                 \
      const LayerNormShiftMixBackward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
