// wkv7, forward and backward. Source and equations: model/ops/wkv7.h.
//
// Launch shape: a block owns 32 lines of a head's state; a thread has 8 numbers of 2 of them in
// registers, and N / 8 neighbouring lanes add up their parts. With 4 lines a thread reads half as
// much, but a token's chain (the update, the sums, u for the next token) is longer, and it is what
// everything waits for. Tokens come through shared memory in blocks of 32 or 8. Of a line's numbers
// a thread has four neighbours out of every N / 2, so that the lanes of a warp read neighbouring
// words.
//
// Lines are rows (values) in forward and in backward_rows, which goes back through D in the same
// way and leaves dv and du. They are columns (keys) in backward_columns, which has the sums over
// values: it goes back through D once more, with du known, and through the states: from one that
// forward kept every 32 tokens, or made again on the way to the next, eight steps back by dividing
// by w.
//
// Floor, multiply-adds a number of the state and token: forward 5, backward 5 and 11, and 2.25 for
// the states made again.
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"
#include "cuda/wkv7_kernel.h"

namespace rwkv {
namespace {

constexpr int kLines = 32;       // of a block
constexpr int kThreadLines = 2;  // that a thread has a part of
constexpr int kNumbers = 8;      // of that part
constexpr int kRowTokens = 32;
constexpr int kColumnTokens = 8;
// Of a multiprocessor, at least: 168 and 255 registers each. With more nvcc reads so far ahead that
// it spills.
constexpr int kThreadsAtOnce = 384;
constexpr int kColumnThreadsAtOnce = 256;

// log(w) = -e^{-1/2} gate; and the same for powers of two.
constexpr float kMostDecay = 0.60653066f;
constexpr float kMostDecayLog2 = 0.87503871f;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f));
}
__device__ __forceinline__ float decay_of(float gate) {
  return fast_exp2(gate * -kMostDecayLog2);
}

// Of its lines, a thread's parts.
using Part = float[kThreadLines][kNumbers];

// What a thread is in charge of.
template <int kSize>
struct Place {
  static constexpr int kParts = kSize / kNumbers;
  static constexpr int kBlocks = kSize / kLines;  // of a head
  static constexpr int kThreads = kLines / kThreadLines * kParts;
  static constexpr int kSharers = kParts / kThreadLines;  // lanes that end with the same line's sum

  __device__ explicit Place(const Wkv7Sizes& sizes)
      : part(static_cast<int>(threadIdx.x) % kParts),
        own(static_cast<int>(threadIdx.x) / kParts * kThreadLines),
        line(static_cast<int>(blockIdx.x) % kBlocks * kLines + own),
        number(static_cast<int64_t>(blockIdx.x) / kBlocks),
        row(number / sizes.H),
        n_embd(sizes.H * kSize),
        head_first(number % sizes.H * kSize),
        first(row * sizes.T * n_embd + head_first) {}

  int part;        // of the lines
  int own;         // the first line's place among the block's
  int line;        // and of the head's state
  int64_t number;  // of the head, over all batch rows
  int64_t row;     // of the batch
  int64_t n_embd;
  int64_t head_first;  // channel of the head
  int64_t first;       // element of the head's first channel in a tensor, of the row's first token
  __device__ __forceinline__ int first_line() const { return line - own; }
  // Which of the thread's lines own_line_sum() is of, and whether this lane is the one to store it.
  __device__ __forceinline__ int summed() const { return part / kSharers; }
  __device__ __forceinline__ bool stores() const { return part % kSharers == 0; }
};

// Neighbours, of a place that is aligned to them.
__device__ __forceinline__ void load(const float* from, float (&x)[4]) {
  const float4 packed = *reinterpret_cast<const float4*>(from);
  x[0] = packed.x, x[1] = packed.y, x[2] = packed.z, x[3] = packed.w;
}
__device__ __forceinline__ void load(const float* from, float (&x)[2]) {
  const float2 packed = *reinterpret_cast<const float2*>(from);
  x[0] = packed.x, x[1] = packed.y;
}
__device__ __forceinline__ void store(const float (&x)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store(const float (&x)[2], float* to) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}

// Calls work(e, four) for the thread's numbers of a line, four neighbours at a time: e ... e + 3 of
// its own are four ... four + 3 of the line.
template <int kSize, typename Work>
__device__ __forceinline__ void for_own_fours(int part, const Work& work) {
#pragma unroll
  for (int e = 0; e < kNumbers; e += 4) {
    work(e, e * Place<kSize>::kParts + part * 4);
  }
}
template <int kCount>
__device__ __forceinline__ void fill(float value, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = value;
  }
}
__device__ __forceinline__ void fill(float value, Part& m) {
#pragma unroll
  for (int line = 0; line < kThreadLines; ++line) {
    fill(value, m[line]);
  }
}

// Of a matrix [N, N] in memory, the lines as columns: m[line][e] is matrix[four + e][line].
template <int kSize>
__device__ __forceinline__ void load_columns(const float* matrix, const Place<kSize>& at, Part& m) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kThreadLines];
      load(matrix + (four + i) * kSize + at.line, x);
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        m[line][e + i] = x[line];
      }
    }
  });
}
template <int kSize>
__device__ __forceinline__ void store_columns(const Part& m,
                                              const Place<kSize>& at,
                                              float* matrix) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kThreadLines];
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        x[line] = m[line][e + i];
      }
      store(x, matrix + (four + i) * kSize + at.line);
    }
  });
}
// The lines as rows.
template <int kSize>
__device__ __forceinline__ void load_rows(const float* matrix, const Place<kSize>& at, Part& m) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      float x[4];
      load(matrix + (at.line + line) * kSize + four, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m[line][e + i] = x[i];
      }
    }
  });
}
template <int kSize>
__device__ __forceinline__ void store_rows(const Part& m, const Place<kSize>& at, float* matrix) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      const float x[4] = {m[line][e], m[line][e + 1], m[line][e + 2], m[line][e + 3]};
      store(x, matrix + (at.line + line) * kSize + four);
    }
  });
}

// The sums of all parts of the thread's lines, the same bits in all lanes that have one.
template <int kParts>
__device__ __forceinline__ void sum_lines(float (&x)[kThreadLines]) {
#pragma unroll
  for (int distance = kParts / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      x[line] += __shfl_xor_sync(kAllLanes, x[line], distance);
    }
  }
}
// Of one of the thread's lines only, Place::summed(): with each step a lane gives half of its lines
// away.
template <int kParts>
__device__ __forceinline__ float own_line_sum(float (&x)[kThreadLines], int part) {
  int distance = kParts / 2;
#pragma unroll
  for (int half = kThreadLines / 2; half > 0; half /= 2, distance /= 2) {
    const bool is_upper = (part & distance) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = is_upper ? x[i] : x[i + half];
      const float kept = is_upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
  }
  return x[0];
}

// Calls work(place among the tokens, channel) for every eighth of kTokens x kChannels cells, shared
// among the threads: unrolled, so that all that a thread reads is under way at once.
template <int kThreads, int kTokens, int kChannels, typename Work>
__device__ __forceinline__ void for_eights(int tokens, const Work& work) {
  constexpr int kEights = kTokens * kChannels / 8;
#pragma unroll
  for (int first = 0; first < kEights; first += kThreads) {
    const int cell = (first + static_cast<int>(threadIdx.x)) * 8;
    if (cell < tokens * kChannels) {
      work(cell / kChannels, cell % kChannels);
    }
  }
}

// Eight neighbours into shared memory, as numbers.
template <typename Element>
__device__ __forceinline__ void copy8(const Element* from, float* to) {
  float x[8];
  load8(from, x);
  store8(to, x);
}
// The same of w_raw as gates, which decays come from.
template <typename Element>
__device__ __forceinline__ void load_gates(const float* w0,
                                           const Element* w_raw,
                                           float (&gate)[8]) {
  float bias[8];
  load8(w0, bias);
  load8(w_raw, gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    gate[i] = sigmoid(bias[i] + gate[i]);
  }
}
__device__ __forceinline__ void store_decays(const float (&gate)[8], float* to) {
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    w[i] = decay_of(gate[i]);
  }
  store8(to, w);
}
__device__ __forceinline__ void fill8(float value, float* to) {
  const float x[8] = {value, value, value, value, value, value, value, value};
  store8(to, x);
}

// Bit i: a document starts at token first + i. By whole warps; `starts` [T] may be null.
__device__ __forceinline__ uint32_t starts_from(const bool* starts, int64_t first, int64_t T) {
  const int64_t t = first + static_cast<int>(threadIdx.x) % kWarpSize;
  return __ballot_sync(kAllLanes, starts != nullptr && t < T && starts[t]);
}

__device__ __forceinline__ int smaller(int64_t x, int y) {
  return x < y ? static_cast<int>(x) : y;
}

// One token's way through the thread's lines: m = m decay + second second_keys + first first_keys;
// the thread's parts of the sums of m with both queries. `first` is the last to be known.
template <int kSize>
__device__ __forceinline__ void advance(Part& m,
                                        int part,
                                        const float* decay,
                                        const float (&first)[kThreadLines],
                                        const float* first_keys,
                                        const float (&second)[kThreadLines],
                                        const float* second_keys,
                                        const float* first_query,
                                        const float* second_query,
                                        float (&first_sums)[kThreadLines],
                                        float (&second_sums)[kThreadLines]) {
  fill(0.0f, first_sums);
  fill(0.0f, second_sums);
  for_own_fours<kSize>(part, [&](int e, int four) {
    float w[4], x[4], z[4], p[4], q[4];
    load(decay + four, w);
    load(first_keys + four, x);
    load(second_keys + four, z);
    load(first_query + four, p);
    load(second_query + four, q);
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& own = m[line][e + i];
        own = fmaf(first[line], x[i], fmaf(second[line], z[i], own * w[i]));
        first_sums[line] = fmaf(own, p[i], first_sums[line]);
        second_sums[line] = fmaf(own, q[i], second_sums[line]);
      }
    }
  });
}

// ---- Forward ------------------------------------------------------------------------------------

template <int kSize>
constexpr int kForwardFloats = (5 * kRowTokens + 1) * kSize + kRowTokens* kLines;

template <typename Element, int kSize>
__global__ void __launch_bounds__(Place<kSize>::kThreads, kThreadsAtOnce / Place<kSize>::kThreads)
    wkv7_forward_kernel(const Wkv7Forward<Element> x) {
  using P = Place<kSize>;
  const Wkv7Sizes& sizes = x.in.sizes;
  const P at(sizes);
  float* const r = static_cast<float*>(shared_memory());  // [tokens, N] each
  float *const k = r + kRowTokens * kSize, *const b = k + kRowTokens * kSize,
               *const w = b + kRowTokens * kSize,
               *const a = w + kRowTokens * kSize,            // one token more
                   *const v = a + (kRowTokens + 1) * kSize;  // [tokens, lines]
  Part S;
  load_columns(x.state + at.number * kSize * kSize, at, S);
  const int64_t num_carries = ceil_div(sizes.T, kWkv7CarryLen) + 1;
  float* const carries =
      x.carries == nullptr ? nullptr : x.carries + at.number * num_carries * kSize * kSize;
  const bool* const starts = x.in.starts == nullptr ? nullptr : x.in.starts + at.row * sizes.T;
  float u[kThreadLines] = {};
  float* u_out = x.u == nullptr || at.part != 0 ? nullptr : x.u + at.first + at.line;
  Element* y_out = x.y + at.first + at.line + at.summed();
  for (int64_t begin = 0; begin < sizes.T; begin += kRowTokens) {
    const int tokens = smaller(sizes.T - begin, kRowTokens);
    const int64_t block_first = at.first + begin * at.n_embd;
    const uint32_t start_bits = starts_from(starts, begin, sizes.T);
    static_assert(kRowTokens == kWkv7CarryLen && kRowTokens == kWarpSize);
    if (carries != nullptr) {
      store_rows(S, at, carries + begin / kWkv7CarryLen * kSize * kSize);
    }
    __syncthreads();
    for_eights<P::kThreads, kRowTokens, kSize>(tokens, [&](int token, int channel) {
      const int64_t from = block_first + token * at.n_embd + channel;
      const int to = token * kSize + channel;
      float gate[8];
      load_gates(x.in.w0 + at.head_first + channel, x.in.w_raw + from, gate);
      copy8(x.in.r + from, r + to);
      copy8(x.in.k + from, k + to);
      copy8(x.in.b + from, b + to);
      store_decays(gate, w + to);
    });
    // Of the token after the last there is none: nothing is read off for it.
    for_eights<P::kThreads, kRowTokens + 1, kSize>(tokens + 1, [&](int token, int channel) {
      float* const to = a + token * kSize + channel;
      if (begin + token < sizes.T) {
        copy8(x.in.a + block_first + token * at.n_embd + channel, to);
      } else {
        fill8(0.0f, to);
      }
    });
    for_eights<P::kThreads, kRowTokens, kLines>(tokens, [&](int token, int own) {
      copy8(x.in.v + block_first + token * at.n_embd + at.first_line() + own,
            v + token * kLines + own);
    });
    __syncthreads();
    if (begin == 0) {
      for_own_fours<kSize>(at.part, [&](int e, int four) {
        float first_a[4];
        load(a + four, first_a);
#pragma unroll
        for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            u[line] += S[line][e + i] * first_a[i];
          }
        }
      });
      sum_lines<P::kParts>(u);
    }
// So that the second token's reads are under way in the first, here and below. Not 3: nvcc 13.0
// then leaves out the check for the end.
#pragma unroll 2
    for (int token = 0; token < tokens; ++token) {
      if ((start_bits >> token & 1) != 0) {
        fill(0.0f, S);
        fill(0.0f, u);
      }
      if (u_out != nullptr) {
        store(u, u_out);
        u_out += at.n_embd;
      }
      float own_v[kThreadLines], y[kThreadLines], u_next[kThreadLines];
      load(v + token * kLines + at.own, own_v);
      advance<kSize>(S,
                     at.part,
                     w + token * kSize,
                     u,
                     b + token * kSize,
                     own_v,
                     k + token * kSize,
                     r + token * kSize,
                     a + (token + 1) * kSize,
                     y,
                     u_next);
      sum_lines<P::kParts>(u_next);
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        u[line] = u_next[line];
      }
      const float own_y = own_line_sum<P::kParts>(y, at.part);
      if (at.stores()) {
        *y_out = from_float<Element>(own_y);
      }
      y_out += at.n_embd;
    }
  }
  store_columns(S, at, x.state_out + at.number * kSize * kSize);
  if (carries != nullptr) {
    store_rows(S, at, carries + (num_carries - 1) * kSize * kSize);
  }
}

// ---- Backward: dv, du, the gradient of the first state ------------------------------------------

template <int kSize>
constexpr int kRowsFloats = (5 * kRowTokens + 2 + 2) * kSize + kRowTokens* kLines;

template <typename Element, int kSize>
__global__ void __launch_bounds__(Place<kSize>::kThreads, kThreadsAtOnce / Place<kSize>::kThreads)
    wkv7_backward_rows_kernel(const Wkv7Backward<Element> x) {
  using P = Place<kSize>;
  const Wkv7Sizes& sizes = x.in.sizes;
  const P at(sizes);
  const bool* const starts = x.in.starts == nullptr ? nullptr : x.in.starts + at.row * sizes.T;
  float* const r = static_cast<float*>(shared_memory());
  float *const k = r + kRowTokens * kSize, *const b = k + kRowTokens * kSize,
               *const w = b + kRowTokens * kSize,  // one token more, as a
                   *const a = w + (kRowTokens + 1) * kSize,
               // w and a of no token: D comes over a document's end as it is, which is zero. Those
               // of the next document may be NaN.
                       *const no_w = a + (kRowTokens + 1) * kSize, *const no_a = no_w + kSize,
               *const dy = no_a + kSize;
  for_eights<P::kThreads, 1, kSize>(1, [&](int, int channel) {
    fill8(1.0f, no_w + channel);
    fill8(0.0f, no_a + channel);
  });
  Part D;
  fill(0.0f, D);
  if (x.dstate_out != nullptr) {
    load_columns(x.dstate_out + at.number * kSize * kSize, at, D);
  }
  float du[kThreadLines] = {};
  const int64_t last_out = at.first + (sizes.T - 1) * at.n_embd + at.line;
  float* du_out = x.du + last_out;
  Element* dv_out = x.dv + last_out + at.summed();
  for (int64_t begin = (sizes.T - 1) / kRowTokens * kRowTokens; begin >= 0; begin -= kRowTokens) {
    const int tokens = smaller(sizes.T - begin, kRowTokens);
    const int64_t block_first = at.first + begin * at.n_embd;
    const uint32_t last_bits = starts_from(starts, begin + 1, sizes.T);
    __syncthreads();
    for_eights<P::kThreads, kRowTokens, kSize>(tokens, [&](int token, int channel) {
      const int64_t from = block_first + token * at.n_embd + channel;
      const int to = token * kSize + channel;
      copy8(x.in.r + from, r + to);
      copy8(x.in.k + from, k + to);
      copy8(x.in.b + from, b + to);
    });
    // Of the token after the last there is none: D comes from dstate_out as it is.
    for_eights<P::kThreads, kRowTokens + 1, kSize>(tokens + 1, [&](int token, int channel) {
      const int64_t from = block_first + token * at.n_embd + channel;
      const int to = token * kSize + channel;
      if (begin + token < sizes.T) {
        float gate[8];
        load_gates(x.in.w0 + at.head_first + channel, x.in.w_raw + from, gate);
        copy8(x.in.a + from, a + to);
        store_decays(gate, w + to);
      } else {
        fill8(1.0f, w + to);
        fill8(0.0f, a + to);
      }
    });
    for_eights<P::kThreads, kRowTokens, kLines>(tokens, [&](int token, int own) {
      copy8(x.dy + block_first + token * at.n_embd + at.first_line() + own,
            dy + token * kLines + own);
    });
    __syncthreads();
#pragma unroll 2
    for (int token = tokens - 1; token >= 0; --token) {
      const bool is_last_of_document = (last_bits >> token & 1) != 0;
      if (is_last_of_document) {
        fill(0.0f, D);
        fill(0.0f, du);
      }
      float own_dy[kThreadLines], dv[kThreadLines], du_here[kThreadLines];
      load(dy + token * kLines + at.own, own_dy);
      advance<kSize>(D,
                     at.part,
                     is_last_of_document ? no_w : w + (token + 1) * kSize,
                     du,
                     is_last_of_document ? no_a : a + (token + 1) * kSize,
                     own_dy,
                     r + token * kSize,
                     k + token * kSize,
                     b + token * kSize,
                     dv,
                     du_here);
      sum_lines<P::kParts>(du_here);
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        du[line] = du_here[line];
      }
      const float own_dv = own_line_sum<P::kParts>(dv, at.part);
      if (at.part == 0) {
        store(du, du_out);
      }
      if (at.stores()) {
        *dv_out = from_float<Element>(own_dv);
      }
      du_out -= at.n_embd;
      dv_out -= at.n_embd;
    }
  }
  // w and a of the first token are in shared memory still.
  const bool is_cut = starts != nullptr && starts[0];
  for_own_fours<kSize>(at.part, [&](int e, int four) {
    float first_w[4], first_a[4];
    load(w + four, first_w);
    load(a + four, first_a);
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& own = D[line][e + i];
        own = is_cut ? 0.0f : own * first_w[i] + du[line] * first_a[i];
      }
    }
  });
  store_columns(D, at, x.dstate + at.number * kSize * kSize);
}

// ---- Backward: all gradients that are sums over values ------------------------------------------

template <int kSize>
constexpr int kTokensFloats = (4 * kColumnTokens + 2) * kSize + (6 * kColumnTokens + 2) * kLines;
template <int kSize>
constexpr int kColumnsFloats = kTokensFloats<kSize> +
                               (kWkv7CarryLen / kColumnTokens - 1) * kLines* kSize;

// What the columns kernel has of its tokens in shared memory.
template <int kSize>
struct ColumnTokens {
  __device__ explicit ColumnTokens(float* shared)
      : v(shared),
        u(v + kColumnTokens * kSize),
        dy(u + kColumnTokens * kSize),
        du(dy + kColumnTokens * kSize),
        no_du(du + (kColumnTokens + 1) * kSize),
        r(no_du + kSize),
        k(r + kColumnTokens * kLines),
        b(k + kColumnTokens * kLines),
        gate(b + kColumnTokens * kLines),
        w(gate + kColumnTokens * kLines),
        a(w + (kColumnTokens + 1) * kLines) {}
  float *v, *u, *dy;        // [tokens, N]
  float* du;                // one token more
  float* no_du;             // [N], of no token
  float *r, *k, *b, *gate;  // [tokens, lines]
  float *w, *a;             // one token more
};

// The states that a thread's parts take again on the way forward through a stretch of
// kWkv7CarryLen tokens, after each of its blocks but the last; each thread its own.
constexpr int kStatesMade = kWkv7CarryLen / kColumnTokens - 1;
template <int kSize>
struct StatesMade {
  float* first;  // [kStatesMade, kThreadLines, kNumbers / 4, threads, 4]

  __device__ __forceinline__ float* place(int number, int line, int e) const {
    return first +
           (((number * kThreadLines + line) * (kNumbers / 4) + e / 4) * Place<kSize>::kThreads +
            static_cast<int>(threadIdx.x)) *
               4;
  }
  __device__ __forceinline__ void keep(int number, const Part& S) const {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
      for (int e = 0; e < kNumbers; e += 4) {
        const float x[4] = {S[line][e], S[line][e + 1], S[line][e + 2], S[line][e + 3]};
        store(x, place(number, line, e));
      }
    }
  }
  __device__ __forceinline__ void get(int number, Part& S) const {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
      for (int e = 0; e < kNumbers; e += 4) {
        float x[4];
        load(place(number, line, e), x);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          S[line][e + i] = x[i];
        }
      }
    }
  }
};

// The state that forward kept before a stretch.
template <typename Element, int kSize>
__device__ __forceinline__ void load_carry(const Wkv7Backward<Element>& x,
                                           const Place<kSize>& at,
                                           int64_t stretch,
                                           Part& S) {
  const int64_t num_carries = ceil_div(x.in.sizes.T, kWkv7CarryLen) + 1;
  load_columns(x.carries + (at.number * num_carries + stretch) * kSize * kSize, at, S);
}

// Takes the state through up to kColumnTokens tokens from `begin` on.
template <typename Element, int kSize>
__device__ __forceinline__ void advance_columns(const Wkv7Backward<Element>& x,
                                                const Place<kSize>& at,
                                                const ColumnTokens<kSize>& shared,
                                                int64_t begin,
                                                int tokens,
                                                Part& S) {
  constexpr int kThreads = Place<kSize>::kThreads;
  const int64_t block_first = at.first + begin * at.n_embd;
  __syncthreads();
  for_eights<kThreads, kColumnTokens, kSize>(tokens, [&](int token, int channel) {
    const int64_t from = block_first + token * at.n_embd + channel;
    copy8(x.in.v + from, shared.v + token * kSize + channel);
    copy8(x.u + from, shared.u + token * kSize + channel);
  });
  for_eights<kThreads, kColumnTokens, kLines>(tokens, [&](int token, int own) {
    const int line = at.first_line() + own, to = token * kLines + own;
    const int64_t from = block_first + token * at.n_embd + line;
    float gate[8];
    load_gates(x.in.w0 + at.head_first + line, x.in.w_raw + from, gate);
    copy8(x.in.k + from, shared.k + to);
    copy8(x.in.b + from, shared.b + to);
    store_decays(gate, shared.w + to);
  });
  __syncthreads();
  for (int token = 0; token < tokens; ++token) {
    if (x.in.starts != nullptr && x.in.starts[at.row * x.in.sizes.T + begin + token]) {
      fill(0.0f, S);
    }
    const int own = token * kLines + at.own;
    float w[kThreadLines], b[kThreadLines], k[kThreadLines];
    load(shared.w + own, w);
    load(shared.b + own, b);
    load(shared.k + own, k);
    for_own_fours<kSize>(at.part, [&](int e, int four) {
      float v[4], u[4];
      load(shared.v + token * kSize + four, v);
      load(shared.u + token * kSize + four, u);
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& s = S[line][e + i];
          s = s * w[line] + u[i] * b[line] + v[i] * k[line];
        }
      }
    });
  }
}

template <typename Element, int kSize>
__device__ __forceinline__ void load_column_tokens(const Wkv7Backward<Element>& x,
                                                   const Place<kSize>& at,
                                                   const ColumnTokens<kSize>& shared,
                                                   int64_t begin,
                                                   int tokens) {
  constexpr int kThreads = Place<kSize>::kThreads;
  const int64_t block_first = at.first + begin * at.n_embd;
  __syncthreads();
  for_eights<kThreads, kColumnTokens, kSize>(tokens, [&](int token, int channel) {
    const int64_t from = block_first + token * at.n_embd + channel;
    const int to = token * kSize + channel;
    copy8(x.in.v + from, shared.v + to);
    copy8(x.u + from, shared.u + to);
    copy8(x.dy + from, shared.dy + to);
  });
  for_eights<kThreads, kColumnTokens + 1, kSize>(tokens + 1, [&](int token, int channel) {
    float* const to = shared.du + token * kSize + channel;
    if (begin + token < x.in.sizes.T) {
      copy8(x.du + block_first + token * at.n_embd + channel, to);
    } else {
      fill8(0.0f, to);
    }
  });
  for_eights<kThreads, kColumnTokens + 1, kLines>(tokens + 1, [&](int token, int own) {
    const int line = at.first_line() + own, to = token * kLines + own;
    const int64_t from = block_first + token * at.n_embd + line;
    if (begin + token >= x.in.sizes.T) {
      // D comes from dstate_out as it is.
      fill8(1.0f, shared.w + to);
      fill8(0.0f, shared.a + to);
      return;
    }
    float gate[8];
    load_gates(x.in.w0 + at.head_first + line, x.in.w_raw + from, gate);
    copy8(x.in.a + from, shared.a + to);
    store_decays(gate, shared.w + to);
    if (token < tokens) {
      store8(shared.gate + to, gate);
      copy8(x.in.r + from, shared.r + to);
      copy8(x.in.k + from, shared.k + to);
      copy8(x.in.b + from, shared.b + to);
    }
  });
  __syncthreads();
}

template <typename Element, int kSize>
__global__ void __launch_bounds__(Place<kSize>::kThreads,
                                  kColumnThreadsAtOnce / Place<kSize>::kThreads)
    wkv7_backward_columns_kernel(const Wkv7Backward<Element> x) {
  using P = Place<kSize>;
  const Wkv7Sizes& sizes = x.in.sizes;
  const P at(sizes);
  const bool* const starts = x.in.starts == nullptr ? nullptr : x.in.starts + at.row * sizes.T;
  float* const all_shared = static_cast<float*>(shared_memory());
  const ColumnTokens<kSize> shared(all_shared);
  const StatesMade<kSize> made{all_shared + kTokensFloats<kSize>};
  for_eights<P::kThreads, 1, kSize>(1,
                                    [&](int, int channel) { fill8(0.0f, shared.no_du + channel); });
  Part D, S;
  fill(0.0f, D);
  if (x.dstate_out != nullptr) {
    load_rows(x.dstate_out + at.number * kSize * kSize, at, D);
  }
  float dw0 = 0.0f;
  int64_t out = at.first + (sizes.T - 1) * at.n_embd + at.line + at.summed();
  for (int64_t begin = (sizes.T - 1) / kColumnTokens * kColumnTokens; begin >= 0;
       begin -= kColumnTokens) {
    const int tokens = smaller(sizes.T - begin, kColumnTokens);
    const int64_t stretch = begin / kWkv7CarryLen, stretch_first = stretch * kWkv7CarryLen;
    const int block = static_cast<int>(begin - stretch_first) / kColumnTokens;
    if (begin + tokens == sizes.T || block == kStatesMade) {
      // A new stretch: the state behind it was kept, those behind its other blocks are made.
      load_carry(x, at, stretch, S);
      for (int number = 0; number < block; ++number) {
        advance_columns(x, at, shared, stretch_first + number * kColumnTokens, kColumnTokens, S);
        made.keep(number, S);
      }
      load_carry(x, at, stretch + 1, S);
    } else {
      made.get(block, S);
    }
    load_column_tokens(x, at, shared, begin, tokens);
    const uint32_t start_bits = starts_from(starts, begin, sizes.T);
#pragma unroll 2
    for (int token = tokens - 1; token >= 0; --token) {
      const bool is_last_of_document = (start_bits >> (token + 1) & 1) != 0;
      if (is_last_of_document) {
        fill(0.0f, D);
        if (token + 1 < tokens) {
          // No way leads back over a start: forward once more, from the block before.
          if (block == 0) {
            load_carry(x, at, stretch, S);
          } else {
            made.get(block - 1, S);
          }
          advance_columns(x, at, shared, begin, token + 1, S);
          load_column_tokens(x, at, shared, begin, tokens);
        }
      }
      const int own = token * kLines + at.own;
      float r[kThreadLines], k[kThreadLines], b[kThreadLines], w_inverse[kThreadLines],
          w_after[kThreadLines], a_after[kThreadLines];
      load(shared.r + own, r);
      load(shared.k + own, k);
      load(shared.b + own, b);
      load(shared.w + own, w_inverse);
      load(shared.w + own + kLines, w_after);
      load(shared.a + own + kLines, a_after);
      const float* du_of_after = shared.du + (token + 1) * kSize;
      if (is_last_of_document) {
        // A NaN of the next document stays there.
        fill(1.0f, w_after);
        fill(0.0f, a_after);
        du_of_after = shared.no_du;
      }
      float dr[kThreadLines] = {}, dk[kThreadLines] = {}, db[kThreadLines] = {},
            da[kThreadLines] = {}, dw[kThreadLines] = {};
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        w_inverse[line] = fast_reciprocal(w_inverse[line]);
      }
      for_own_fours<kSize>(at.part, [&](int e, int four) {
        float v[4], u[4], dy[4], du[4], du_after[4];
        keep_reads_behind();
        load(shared.v + token * kSize + four, v);
        load(shared.u + token * kSize + four, u);
        load(shared.dy + token * kSize + four, dy);
        load(shared.du + token * kSize + four, du);
        load(du_of_after + four, du_after);
#pragma unroll
        for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float d =
                D[line][e + i] * w_after[line] + du_after[i] * a_after[line] + dy[i] * r[line];
            D[line][e + i] = d;
            const float s = S[line][e + i];
            const float s_before = (s - v[i] * k[line] - u[i] * b[line]) * w_inverse[line];
            S[line][e + i] = s_before;
            dr[line] += s * dy[i];
            dk[line] += d * v[i];
            db[line] += d * u[i];
            da[line] += s_before * du[i];
            dw[line] += d * s_before;
          }
        }
      });
      const float own_dr = own_line_sum<P::kParts>(dr, at.part);
      const float own_dk = own_line_sum<P::kParts>(dk, at.part);
      const float own_db = own_line_sum<P::kParts>(db, at.part);
      float own_da = own_line_sum<P::kParts>(da, at.part);
      float own_dw = own_line_sum<P::kParts>(dw, at.part);
      if ((start_bits >> token & 1) != 0) {
        // The state before it is zero, not what comes of going back.
        own_da = own_dw = 0.0f;
      }
      const float w = shared.w[own + at.summed()], gate = shared.gate[own + at.summed()];
      const float dw_raw = own_dw * w * (gate * -kMostDecay) * (1.0f - gate);
      dw0 += dw_raw;
      if (at.stores()) {
        x.dr[out] = from_float<Element>(own_dr);
        x.dk[out] = from_float<Element>(own_dk);
        x.db[out] = from_float<Element>(own_db);
        x.da[out] = from_float<Element>(own_da);
        x.dw_raw[out] = from_float<Element>(dw_raw);
      }
      out -= at.n_embd;
    }
  }
  if (at.stores()) {
    x.dw0[at.number * kSize + at.line + at.summed()] = dw0;
  }
}

// ---- Launching ----------------------------------------------------------------------------------

template <int kSize>
LaunchShape shape_of(const Wkv7Sizes& sizes, int shared_floats) {
  return {.grid = dim3(static_cast<unsigned>(sizes.B * sizes.H * Place<kSize>::kBlocks)),
          .block = dim3(Place<kSize>::kThreads),
          .shared_bytes = static_cast<size_t>(shared_floats) * sizeof(float)};
}

template <int kSize, typename Element>
cudaError_t launch_forward(const Wkv7Forward<Element>& args, cudaStream_t stream) {
  return launch_kernel(&wkv7_forward_kernel<Element, kSize>,
                       shape_of<kSize>(args.in.sizes, kForwardFloats<kSize>),
                       stream,
                       args);
}

template <int kSize, typename Element>
cudaError_t launch_backward(const Wkv7Backward<Element>& args, cudaStream_t stream) {
  const cudaError_t error = launch_kernel(&wkv7_backward_rows_kernel<Element, kSize>,
                                          shape_of<kSize>(args.in.sizes, kRowsFloats<kSize>),
                                          stream,
                                          args);
  return error != cudaSuccess ? error
                              : launch_kernel(&wkv7_backward_columns_kernel<Element, kSize>,
                                              shape_of<kSize>(args.in.sizes, kColumnsFloats<kSize>),
                                              stream,
                                              args);
}

}  // namespace

int64_t wkv7_carries_floats(const Wkv7Sizes& sizes) {
  return sizes.B * sizes.H * (ceil_div(sizes.T, kWkv7CarryLen) + 1) * sizes.N * sizes.N;
}

template <typename Element>
cudaError_t launch_wkv7(const Wkv7Forward<Element>& args, cudaStream_t stream) {
  if (args.in.sizes.B == 0) {
    return cudaSuccess;
  }
  switch (args.in.sizes.N) {
    case 32:
      return launch_forward<32>(args, stream);
    case 64:
      return launch_forward<64>(args, stream);
    case 128:
      return launch_forward<128>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

template <typename Element>
cudaError_t launch_wkv7_backward(const Wkv7Backward<Element>& args, cudaStream_t stream) {
  if (args.in.sizes.B == 0) {
    return cudaSuccess;
  }
  switch (args.in.sizes.N) {
    case 32:
      return launch_backward<32>(args, stream);
    case 64:
      return launch_backward<64>(args, stream);
    case 128:
      return launch_backward<128>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

#define RWKV_INSTANTIATE(Element)                                              \
  template cudaError_t launch_wkv7(const Wkv7Forward<Element>&, cudaStream_t); \
  template cudaError_t launch_wkv7_backward(const Wkv7Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
