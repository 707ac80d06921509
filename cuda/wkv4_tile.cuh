// wkv4 on tiles of 128 tokens: what the chunk scan and the cluster scan share.
//
// A block of 128 threads owns one batch row and 64 bytes of channels (32 in bf16, 16 in fp32). It
// takes a tile as 8 sub-chunks of 16 tokens; 16 lanes share a sub-chunk, 4 bytes of channels each.
// Forward, with F for the pair of sums (a, b) 2^p:
//   1. each lane: F of its own 16 tokens alone;
//   2. one thread per channel: the tile's total, the state before the tile (how depends on the
//      kernel), and from it the state before each sub-chunk;
//   3. each lane: y from that state.
// Within a sub-chunk all numbers have the scale P = max(ceil(max k2), ceil(p)), so that an element
// costs one exponential and the rest is multiplications and additions. That asks that no
// denominator underflows: P - min k2 + |u2| <= 80. Otherwise, at a document's start and in a
// sequence's last, partial sub-chunk, the lane goes token by token with a scale for each (the slow
// path).
//
// Backward takes the state before the tile from forward's carries, so its steps 1 and 2 are local;
// step 3 finds y and q_t = dy_t / D_t again and keeps them in registers; then follow
//   4. each lane: al and be of its own tokens alone, at the sub-chunk's beginning;
//   5. one thread per channel: as 2, from the last sub-chunk to the first;
//   6. each lane, backwards: dk and dv.
// dw_log comes from tangents within the sub-chunk: A'_0 = 0, A'_{t+1} = e^w (A'_t + A_t), B' alike;
// then it is sum_t q_t (A'_t - y_t B'_t) + A'_n al - B'_n be with the adjoints behind the n tokens.
// Every term has the factor e^w that the sum has, so that nothing cancels where decay is strong.
//
// Tiles are summed on their own before they are put together, always in the order of time: results
// do not depend on how many blocks share a sequence.
#pragma once

#include <initializer_list>

#include "cuda/wkv4_scan.cuh"

namespace rwkv::wkv4 {

constexpr int kSubLen = 16;
constexpr int kSubs = 8;
constexpr int kTileLen = kSubs * kSubLen;
static_assert(kTileLen == kWkv4CarryLen);
constexpr int kRowBytes = 64;
constexpr int kLaneBytes = 4;
constexpr int kRowLanes = kRowBytes / kLaneBytes;
constexpr int kThreads = kSubs * kRowLanes;
// A row more, so that the two sub-chunks of a warp lie in different banks.
constexpr int kSubBytes = (kSubLen + 1) * kRowBytes;
constexpr int kStages = 2;

template <typename Element>
constexpr int kChannels = kRowBytes / static_cast<int>(sizeof(Element));
// Channels of a lane.
template <typename Element>
constexpr int kPer = kLaneBytes / static_cast<int>(sizeof(Element));
constexpr int kMostChannels = kRowBytes / 2;

// Bits of range that a sub-chunk may use; fp32 has 126, the rest is for values and sums.
constexpr float kRange = 80.0f;

struct alignas(16) InputTile {
  unsigned char bytes[kSubs * kSubBytes];
};

// Sums of each sub-chunk and channel of a tile.
struct SumTable {
  float a[kSubs][kMostChannels];
  float b[kSubs][kMostChannels];
  float p[kSubs][kMostChannels];

  __device__ __forceinline__ Sums get(int sub, int channel) const {
    return {a[sub][channel], b[sub][channel], p[sub][channel]};
  }
  __device__ __forceinline__ void set(int sub, int channel, Sums sums) {
    a[sub][channel] = sums.a;
    b[sub][channel] = sums.b;
    p[sub][channel] = sums.p;
  }
};

// Number of tokens of the sub-chunk, of a tile with `tile_len`.
__device__ __forceinline__ int tokens_of(int sub, int tile_len) {
  return max(0, min(kSubLen, tile_len - sub * kSubLen));
}

// ---- A lane's words -----------------------------------------------------------------------------

__device__ __forceinline__ void unpack(uint32_t word, float (&x)[1]) {
  x[0] = __uint_as_float(word);
}
__device__ __forceinline__ void unpack(uint32_t word, float (&x)[2]) {
  // A bf16 number is the top half of a float.
  x[0] = __uint_as_float(word << 16);
  x[1] = __uint_as_float(word & 0xffff0000u);
}
__device__ __forceinline__ uint32_t pack(const float (&x)[1]) {
  return __float_as_uint(x[0]);
}
__device__ __forceinline__ uint32_t pack(const float (&x)[2]) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[0], x[1]);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// A lane's channels of a sub-chunk in shared memory.
template <typename Element>
struct Column {
  const unsigned char* first;

  __device__ __forceinline__ void load(int i, float (&x)[kPer<Element>]) const {
    unpack(*reinterpret_cast<const uint32_t*>(first + i * kRowBytes), x);
  }
  __device__ __forceinline__ float at(int i, int channel) const {
    return to_float(reinterpret_cast<const Element*>(first + i * kRowBytes)[channel]);
  }
};
template <typename Element>
__device__ __forceinline__ Column<Element> own_column(const InputTile& tile) {
  return {tile.bytes + threadIdx.x / kRowLanes * kSubBytes + threadIdx.x % kRowLanes * kLaneBytes};
}

// The same of an output in device memory.
template <typename Element>
struct OutputColumn {
  Element* first;
  int64_t stride;
  int channels;  // that exist
  bool words;    // whether all do and lie in one aligned word

  __device__ __forceinline__ void store(int i, const float (&x)[kPer<Element>]) const {
    Element* to = first + i * stride;
    if (words) {
      *reinterpret_cast<uint32_t*>(to) = pack(x);
      return;
    }
#pragma unroll
    for (int channel = 0; channel < kPer<Element>; ++channel) {
      if (channel < channels) {
        to[channel] = from_float<Element>(x[channel]);
      }
    }
  }
  __device__ __forceinline__ void store_one(int i, int channel, float x) const {
    if (channel < channels) {
      first[i * stride + channel] = from_float<Element>(x);
    }
  }
};

// The sub-chunk and the channels that a lane works on.
template <typename Element>
struct LaneChannels {
  int sub;
  int place;  // of the first channel, among the block's
  int64_t c;  // of the first channel, among all
  int count;  // of channels that exist

  __device__ __forceinline__ LaneChannels(int64_t first_channel, int64_t dim)
      : sub(static_cast<int>(threadIdx.x) / kRowLanes),
        place(static_cast<int>(threadIdx.x) % kRowLanes * kPer<Element>),
        c(first_channel + place),
        count(c >= dim                  ? 0
              : dim - c < kPer<Element> ? static_cast<int>(dim - c)
                                        : kPer<Element>) {}

  // A channel that does not exist gets the numbers of the last one.
  __device__ __forceinline__ void load_channels(const float* w_log,
                                                const float* u,
                                                Channel (&channels)[kPer<Element>]) const {
#pragma unroll
    for (int channel = 0; channel < kPer<Element>; ++channel) {
      channels[channel] =
          count == 0 ? Channel{} : load_channel(w_log, u, c + min(channel, count - 1));
    }
  }
  __device__ __forceinline__ void get(const SumTable& table, Sums (&sums)[kPer<Element>]) const {
#pragma unroll
    for (int channel = 0; channel < kPer<Element>; ++channel) {
      sums[channel] = table.get(sub, place + channel);
    }
  }
  __device__ __forceinline__ void set(SumTable& table, const Sums (&sums)[kPer<Element>]) const {
#pragma unroll
    for (int channel = 0; channel < kPer<Element>; ++channel) {
      table.set(sub, place + channel, sums[channel]);
    }
  }
  // In rows [T, A].
  __device__ __forceinline__ OutputColumn<Element> output(Element* rows,
                                                          int64_t first_token,
                                                          int64_t dim,
                                                          bool words) const {
    return {rows + (first_token + sub * kSubLen) * dim + c,
            dim,
            count,
            words && count == kPer<Element>};
  }
};

// ---- Loading tiles ------------------------------------------------------------------------------

// How tensors lie in memory.
struct Layout {
  bool vectors;  // inputs: rows begin at 16-byte boundaries
  bool words;    // outputs: a lane's channels lie in one aligned word
};
template <typename Element>
Layout layout_of(int64_t dim,
                 std::initializer_list<const Element*> inputs,
                 std::initializer_list<const Element*> outputs) {
  constexpr int kPieceBytes = 16;
  const auto aligned = [](std::initializer_list<const Element*> tensors, uintptr_t bytes) {
    bool all = true;
    for (const Element* tensor : tensors) {
      all = all && reinterpret_cast<uintptr_t>(tensor) % bytes == 0;
    }
    return all;
  };
  return {.vectors = dim * static_cast<int64_t>(sizeof(Element)) % kPieceBytes == 0 &&
                     aligned(inputs, kPieceBytes),
          .words = dim % kPer<Element> == 0 && aligned(outputs, kLaneBytes)};
}

// Starts copying this warp's rows of a tile of `rows` [T, A]; with vectors they arrive by the next
// async_copy_wait(), otherwise they are there at once, each lane's own. What lies beyond T or A is
// left as it was.
template <typename Element>
__device__ __forceinline__ void start_copy(InputTile& tile,
                                           const Element* rows,
                                           int64_t first_token,
                                           int64_t seq_len,
                                           int64_t first_channel,
                                           int64_t dim,
                                           bool vectors) {
  constexpr int kPieceBytes = 16;
  constexpr int kPieces = kRowBytes / kPieceBytes;
  if (vectors) {
    const int lane = threadIdx.x % kWarpSize;
    const int piece = lane % kPieces;
    const int64_t c = first_channel + piece * (kPieceBytes / static_cast<int>(sizeof(Element)));
    const int first_row = threadIdx.x / kWarpSize * (2 * kSubLen) + lane / kPieces;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int row = first_row + i * (kWarpSize / kPieces);
      const int64_t t = first_token + row;
      if (t < seq_len && c < dim) {
        async_copy16(tile.bytes + row / kSubLen * kSubBytes + row % kSubLen * kRowBytes +
                         piece * kPieceBytes,
                     rows + t * dim + c);
      }
    }
    return;
  }
  const int sub = threadIdx.x / kRowLanes;
  const int64_t c = first_channel + threadIdx.x % kRowLanes * kPer<Element>;
  auto* own = reinterpret_cast<Element*>(tile.bytes + sub * kSubBytes +
                                         threadIdx.x % kRowLanes * kLaneBytes);
#pragma unroll 4
  for (int i = 0; i < kSubLen; ++i) {
    const int64_t t = first_token + sub * kSubLen + i;
#pragma unroll
    for (int channel = 0; channel < kPer<Element>; ++channel) {
      if (t < seq_len && c < dim) {
        own[i * kChannels<Element> + channel] =
            c + channel < dim ? rows[t * dim + c + channel] : from_float<Element>(0.0f);
      }
    }
  }
}

// ---- A sub-chunk --------------------------------------------------------------------------------

template <typename Element>
struct SubChunk {
  Column<Element> k, v;
  int count;        // of tokens; 0 for a lane without channels
  uint32_t starts;  // bit i: a document starts at token i
};

// Over the keys of a sub-chunk, in base 2.
struct KeyRange {
  float max, min;
};
// All channels of a lane take the same path.
template <int kNum>
__device__ __forceinline__ bool within_range(const KeyRange (&range)[kNum]) {
  bool within = true;
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    within = within && range[channel].max - range[channel].min <= kRange;
  }
  return within;
}
template <typename Element>
__device__ __forceinline__ bool is_plain(const SubChunk<Element>& chunk) {
  return chunk.count == kSubLen && chunk.starts == 0;
}

// Step 1: sums of the tokens alone.
template <typename Element>
__device__ __forceinline__ void sum_tokens(const SubChunk<Element>& chunk,
                                           const Channel (&channels)[kPer<Element>],
                                           KeyRange (&range)[kPer<Element>],
                                           Sums (&sums)[kPer<Element>]) {
  constexpr int kNum = kPer<Element>;
  if (is_plain(chunk)) {
    float max[kNum], min[kNum];
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      max[channel] = kNoScale;
      min[channel] = -kNoScale;
    }
#pragma unroll 8
    for (int i = 0; i < kSubLen; ++i) {
      float k[kNum];
      chunk.k.load(i, k);
#pragma unroll
      for (int channel = 0; channel < kNum; ++channel) {
        max[channel] = fmaxf(max[channel], k[channel]);
        min[channel] = fminf(min[channel], k[channel]);
      }
    }
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      range[channel] = {ceilf(max[channel] * kLog2E), min[channel] * kLog2E};
      sums[channel] = {0.0f, 0.0f, range[channel].max};
    }
    if (within_range(range)) {
#pragma unroll 4
      for (int i = 0; i < kSubLen; ++i) {
        float k[kNum], v[kNum];
        chunk.k.load(i, k);
        chunk.v.load(i, v);
#pragma unroll
        for (int channel = 0; channel < kNum; ++channel) {
          const float e = fast_exp2(fmaf(k[channel], kLog2E, -range[channel].max));
          Sums& own = sums[channel];
          own.a = fmaf(channels[channel].decay, own.a, e * v[channel]);
          own.b = fmaf(channels[channel].decay, own.b, e);
        }
      }
#pragma unroll
      for (int channel = 0; channel < kNum; ++channel) {
        sums[channel] = rescaled_state(sums[channel]);
      }
      return;
    }
  }
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    Sums own = nothing();
#pragma unroll 1
    for (int i = 0; i < chunk.count; ++i) {
      if ((chunk.starts >> i & 1) != 0) {
        own = nothing();
      }
      own = after_token(own, channels[channel].w2, chunk.k.at(i, channel), chunk.v.at(i, channel));
    }
    sums[channel] = rescaled_state(own);
  }
}

// The common scale of a sub-chunk, and the state before it in that scale.
struct Scaled {
  float p;
  float a, b;
};
__device__ __forceinline__ Scaled to_common_scale(Sums state, KeyRange range) {
  const float p = fmaxf(range.max, ceilf(state.p));
  const float factor = fast_exp2(state.p - p);
  return {p, state.a * factor, state.b * factor};
}
// Whether y and all that follows from it can be found in the common scale.
template <int kNum>
__device__ __forceinline__ bool denominators_are_safe(const KeyRange (&range)[kNum],
                                                      const Channel (&channels)[kNum],
                                                      const Sums (&before)[kNum]) {
  bool safe = true;
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    const float p = fmaxf(range[channel].max, ceilf(before[channel].p));
    safe = safe && p - range[channel].min + fabsf(channels[channel].u2) <= kRange;
  }
  return safe;
}

// Step 3 of forward: y, from the state before the sub-chunk.
template <bool kGate, typename Element>
__device__ __forceinline__ void write_averages(const SubChunk<Element>& chunk,
                                               const Column<Element>& r,
                                               const Channel (&channels)[kPer<Element>],
                                               const KeyRange (&range)[kPer<Element>],
                                               const Sums (&before)[kPer<Element>],
                                               const OutputColumn<Element>& out) {
  constexpr int kNum = kPer<Element>;
  if (is_plain(chunk) && denominators_are_safe(range, channels, before)) {
    Scaled state[kNum];
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      state[channel] = to_common_scale(before[channel], range[channel]);
    }
#pragma unroll 4
    for (int i = 0; i < kSubLen; ++i) {
      float k[kNum], v[kNum], y[kNum];
      chunk.k.load(i, k);
      chunk.v.load(i, v);
#pragma unroll
      for (int channel = 0; channel < kNum; ++channel) {
        Scaled& own = state[channel];
        const float f = fast_exp2(fmaf(k[channel], kLog2E, -own.p));
        const float x = f * v[channel];
        y[channel] = fmaf(channels[channel].bonus, x, own.a) *
                     fast_reciprocal(fmaf(channels[channel].bonus, f, own.b));
        own.a = fmaf(channels[channel].decay, own.a, x);
        own.b = fmaf(channels[channel].decay, own.b, f);
      }
      if constexpr (kGate) {
        float gate[kNum];
        r.load(i, gate);
#pragma unroll
        for (int channel = 0; channel < kNum; ++channel) {
          y[channel] *= sigmoid(gate[channel]);
        }
      }
      out.store(i, y);
    }
    return;
  }
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    Sums state = before[channel];
#pragma unroll 1
    for (int i = 0; i < chunk.count; ++i) {
      if ((chunk.starts >> i & 1) != 0) {
        state = nothing();
      }
      const float k = chunk.k.at(i, channel);
      const float v = chunk.v.at(i, channel);
      float y = average(state, channels[channel].u2, k, v).y;
      if constexpr (kGate) {
        y *= sigmoid(r.at(i, channel));
      }
      out.store_one(i, channel, y);
      state = after_token(state, channels[channel].w2, k, v);
    }
  }
}

// ---- Backward -----------------------------------------------------------------------------------

// What step 3 of backward keeps for step 6 where it was done in the common scale: q = dy / D in
// units of 2^-P, and y; and the tangents of dw_log.
template <typename Element>
struct Kept {
  float q[kSubLen][kPer<Element>];
  float y[kSubLen][kPer<Element>];
  float tangent_a[kPer<Element>], tangent_b[kPer<Element>];
  float dw_log[kPer<Element>];
  bool valid;
};

template <typename Element>
struct BackwardInputs {
  Column<Element> dy, r;
  OutputColumn<Element> dr;
};

// Steps 3 and 4: fills `kept` and `adjoints`, those of the tokens before the first start in the
// sub-chunk, and writes dr where there is a gate and `kWriteGate`.
template <bool kGate, bool kWriteGate, typename Element>
__device__ __forceinline__ void sum_adjoints(const SubChunk<Element>& chunk,
                                             const BackwardInputs<Element>& inputs,
                                             const Channel (&channels)[kPer<Element>],
                                             const KeyRange (&range)[kPer<Element>],
                                             const Sums (&before)[kPer<Element>],
                                             Kept<Element>& kept,
                                             Sums (&adjoints)[kPer<Element>]) {
  constexpr int kNum = kPer<Element>;
  kept.valid = is_plain(chunk) && denominators_are_safe(range, channels, before);
  if (kept.valid) {
    Scaled state[kNum];
    float power[kNum];
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      state[channel] = to_common_scale(before[channel], range[channel]);
      power[channel] = 1.0f;
      kept.tangent_a[channel] = kept.tangent_b[channel] = kept.dw_log[channel] = 0.0f;
      adjoints[channel] = {0.0f, 0.0f, -state[channel].p};
    }
#pragma unroll
    for (int i = 0; i < kSubLen; ++i) {
      float k[kNum], v[kNum], dy[kNum];
      chunk.k.load(i, k);
      chunk.v.load(i, v);
      inputs.dy.load(i, dy);
      [[maybe_unused]] float dr[kNum];
      if constexpr (kGate) {
        inputs.r.load(i, dr);
      }
#pragma unroll
      for (int channel = 0; channel < kNum; ++channel) {
        Scaled& own = state[channel];
        const float f = fast_exp2(fmaf(k[channel], kLog2E, -own.p));
        const float x = f * v[channel];
        const float inverse = fast_reciprocal(fmaf(channels[channel].bonus, f, own.b));
        const float y = fmaf(channels[channel].bonus, x, own.a) * inverse;
        float dy_inner = dy[channel];
        if constexpr (kGate) {
          const float gate = sigmoid(dr[channel]);
          dy_inner *= gate;
          dr[channel] = dy_inner * y * (1.0f - gate);
        }
        const float q = dy_inner * inverse;
        adjoints[channel].a = fmaf(power[channel], q, adjoints[channel].a);
        adjoints[channel].b = fmaf(power[channel], q * y, adjoints[channel].b);
        power[channel] *= channels[channel].decay;
        float& tangent_a = kept.tangent_a[channel];
        float& tangent_b = kept.tangent_b[channel];
        kept.dw_log[channel] = fmaf(q, fmaf(-y, tangent_b, tangent_a), kept.dw_log[channel]);
        const float faded_a = channels[channel].decay * own.a;
        const float faded_b = channels[channel].decay * own.b;
        tangent_a = fmaf(channels[channel].decay, tangent_a, faded_a);
        tangent_b = fmaf(channels[channel].decay, tangent_b, faded_b);
        own.a = faded_a + x;
        own.b = faded_b + f;
        kept.q[i][channel] = q;
        kept.y[i][channel] = y;
      }
      if constexpr (kGate && kWriteGate) {
        inputs.dr.store(i, dr);
      }
    }
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      adjoints[channel] = rescaled_adjoint(adjoints[channel]);
    }
    return;
  }
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    Sums state = before[channel];
    Sums adjoint = nothing();
    bool reaches_back = true;
#pragma unroll 1
    for (int i = 0; i < chunk.count; ++i) {
      if ((chunk.starts >> i & 1) != 0) {
        state = nothing();
        reaches_back = false;
      }
      const float k = chunk.k.at(i, channel);
      const float v = chunk.v.at(i, channel);
      const Average token = average(state, channels[channel].u2, k, v);
      float dy = inputs.dy.at(i, channel);
      if constexpr (kGate) {
        const float gate = sigmoid(inputs.r.at(i, channel));
        dy *= gate;
        if constexpr (kWriteGate) {
          inputs.dr.store_one(i, channel, dy * token.y * (1.0f - gate));
        }
      }
      if (reaches_back) {
        const float q = dy * token.inverse;
        const float fade = channels[channel].w2 * static_cast<float>(i);
        adjoint = combined({q, q * token.y, -token.scale}, fade, adjoint);
      }
      state = after_token(state, channels[channel].w2, k, v);
    }
    adjoints[channel] = rescaled_adjoint(adjoint);
  }
}

// Step 6: dk and dv, from the state before the sub-chunk and the adjoints behind it; adds to dw_log
// and du.
template <bool kGate, typename Element>
__device__ __forceinline__ void write_gradients(const SubChunk<Element>& chunk,
                                                const BackwardInputs<Element>& inputs,
                                                const Channel (&channels)[kPer<Element>],
                                                const KeyRange (&range)[kPer<Element>],
                                                const Sums (&before)[kPer<Element>],
                                                const Sums (&behind)[kPer<Element>],
                                                const Kept<Element>& kept,
                                                const OutputColumn<Element>& dk_out,
                                                const OutputColumn<Element>& dv_out,
                                                float (&dw_log)[kPer<Element>],
                                                float (&du)[kPer<Element>]) {
  constexpr int kNum = kPer<Element>;
  bool safe = kept.valid;
  if (safe) {
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      safe =
          safe && behind[channel].p + fmaxf(range[channel].max, ceilf(before[channel].p)) <= kRange;
    }
  }
  if (safe) {
    float p[kNum], al[kNum], be[kNum];
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      p[channel] = fmaxf(range[channel].max, ceilf(before[channel].p));
      const float factor = fast_exp2(behind[channel].p + p[channel]);
      al[channel] = behind[channel].a * factor;
      be[channel] = behind[channel].b * factor;
      dw_log[channel] += fmaf(al[channel],
                              kept.tangent_a[channel],
                              fmaf(-be[channel], kept.tangent_b[channel], kept.dw_log[channel]));
    }
#pragma unroll
    for (int i = kSubLen - 1; i >= 0; --i) {
      float k[kNum], v[kNum], dk[kNum], dv[kNum];
      chunk.k.load(i, k);
      chunk.v.load(i, v);
#pragma unroll
      for (int channel = 0; channel < kNum; ++channel) {
        const float q = kept.q[i][channel];
        const float y = kept.y[i][channel];
        const float f = fast_exp2(fmaf(k[channel], kLog2E, -p[channel]));
        const float bonus = channels[channel].bonus * q;
        const float d = f * bonus * (v[channel] - y);
        dv[channel] = f * (al[channel] + bonus);
        dk[channel] = fmaf(f, fmaf(v[channel], al[channel], -be[channel]), d);
        du[channel] += d;
        al[channel] = fmaf(channels[channel].decay, al[channel], q);
        be[channel] = fmaf(channels[channel].decay, be[channel], q * y);
      }
      dk_out.store(i, dk);
      dv_out.store(i, dv);
    }
    return;
  }
#pragma unroll
  for (int channel = 0; channel < kNum; ++channel) {
    // Indexed by a loop that is not unrolled: in local memory.
    Sums states[kSubLen];
    const Channel own = channels[channel];
    Sums state = before[channel];
#pragma unroll 1
    for (int i = 0; i < chunk.count; ++i) {
      if ((chunk.starts >> i & 1) != 0) {
        state = nothing();
      }
      states[i] = state;
      state = after_token(state, own.w2, chunk.k.at(i, channel), chunk.v.at(i, channel));
    }
    Sums adjoint = behind[channel];
#pragma unroll 1
    for (int i = chunk.count - 1; i >= 0; --i) {
      const float k = chunk.k.at(i, channel);
      const float v = chunk.v.at(i, channel);
      float dy = inputs.dy.at(i, channel);
      if constexpr (kGate) {
        dy *= sigmoid(inputs.r.at(i, channel));
      }
      const TokenGradients token = through_token(states[i], own, k, v, dy, adjoint);
      dk_out.store_one(i, channel, token.dk);
      dv_out.store_one(i, channel, token.dv);
      du[channel] += token.du;
      dw_log[channel] += token.dw_log;
      if ((chunk.starts >> i & 1) != 0) {
        adjoint = nothing();
      }
    }
  }
}

// ---- A tile, by one thread per channel ----------------------------------------------------------

enum class Direction { kForward, kBackward };

// Sums of a whole tile, and whether a document starts in it.
struct TileTotal {
  Sums sums;
  bool has_start;
};
__device__ __forceinline__ void add_sub_chunk(bool has_start,
                                              float fade,
                                              Sums own,
                                              TileTotal& total) {
  total.sums = has_start ? own : combined(total.sums, fade, own);
  total.has_start = total.has_start || has_start;
}
template <Direction kDirection>
__device__ __forceinline__ TileTotal finished(const TileTotal& total) {
  return {
      kDirection == Direction::kForward ? rescaled_state(total.sums) : rescaled_adjoint(total.sums),
      total.has_start};
}
template <Direction kDirection>
__device__ __forceinline__ TileTotal
total_of(const SumTable& table, const uint32_t* starts, int channel, float w2, int tile_len) {
  TileTotal total{nothing(), false};
// Not more at once: backward has few registers left here.
#pragma unroll 2
  for (int i = 0; i < kSubs; ++i) {
    const int sub = kDirection == Direction::kForward ? i : kSubs - 1 - i;
    add_sub_chunk(starts[sub] != 0,
                  w2 * static_cast<float>(tokens_of(sub, tile_len)),
                  table.get(sub, channel),
                  total);
  }
  return finished<kDirection>(total);
}

// What leaves a tile of that total when `incoming` enters it.
__device__ __forceinline__ Sums across_tile(Sums incoming,
                                            float w2,
                                            int tile_len,
                                            const TileTotal& total) {
  return total.has_start ? total.sums
                         : combined(incoming, w2 * static_cast<float>(tile_len), total.sums);
}

// Replaces the sums of each sub-chunk by what enters it. Returns the tile's total as total_of()
// does: its chain runs beside the other, and costs nothing where nobody asks for it.
template <Direction kDirection>
__device__ __forceinline__ TileTotal spread(
    SumTable& table, const uint32_t* starts, int channel, float w2, int tile_len, Sums incoming) {
  TileTotal total{nothing(), false};
// Not more at once: backward has few registers left here.
#pragma unroll 2
  for (int i = 0; i < kSubs; ++i) {
    const int sub = kDirection == Direction::kForward ? i : kSubs - 1 - i;
    const Sums own = table.get(sub, channel);
    table.set(sub, channel, incoming);
    const float fade = w2 * static_cast<float>(tokens_of(sub, tile_len));
    const bool has_start = starts[sub] != 0;
    incoming = has_start ? own : combined(incoming, fade, own);
    add_sub_chunk(has_start, fade, own, total);
  }
  return finished<kDirection>(total);
}

// Bit i: a document starts at token i of this lane's sub-chunk. By whole warps; `own` is whether it
// does at the token that has this lane's number in its row of lanes.
__device__ __forceinline__ uint32_t starts_of_sub(bool own) {
  const uint32_t both = __ballot_sync(kAllLanes, own);
  return both >> (threadIdx.x % kWarpSize / kRowLanes * kRowLanes) & 0xffffu;
}
__device__ __forceinline__ bool starts_at_own_token(const bool* starts,
                                                    int64_t first_token,
                                                    int64_t seq_len) {
  const int64_t t = first_token + threadIdx.x;
  return starts != nullptr && t < seq_len && starts[t];
}

}  // namespace rwkv::wkv4
