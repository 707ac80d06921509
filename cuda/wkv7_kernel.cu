// wkv7, forward and backward. Source and equations: model/ops/wkv7.h.
//
// Launch shape: a block owns 32 lines of a head's state, N / 32 threads a line, each with 32 of its
// numbers in registers; 1, 2 or 4 neighbouring lanes add up their parts. Tokens come through shared
// memory in blocks of 16 or 8. Of a line's numbers a thread has four neighbours out of every N / 8,
// so that the lanes of a warp read neighbouring words.
//
// Lines are rows (values) in forward and in backward_rows, which goes back through D in the same
// way and leaves dv and du. They are columns (keys) in backward_columns, which has the sums over
// values: it goes back through D once more, with du known, and through the states: from one that
// forward kept, or that it makes again from there, eight steps back by dividing by w.
//
// Floor, multiply-adds a number of the state and token: forward 5, backward 5 and 11, and 4.5 for
// the states made again.
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"
#include "cuda/wkv7_kernel.h"

namespace rwkv {
namespace {

constexpr int kLines = 32;    // of a block
constexpr int kPerLane = 32;  // numbers of a line that a thread has
constexpr int kRowTokens = 16;
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

// What a thread is in charge of.
template <int kSize>
struct Place {
  static constexpr int kParts = kSize / kPerLane;
  static constexpr int kBlocks = kSize / kLines;  // of a head
  static constexpr int kThreads = kLines * kParts;

  __device__ explicit Place(const Wkv7Sizes& sizes)
      : part(static_cast<int>(threadIdx.x) % kParts),
        own(static_cast<int>(threadIdx.x) / kParts),
        line(static_cast<int>(blockIdx.x) % kBlocks * kLines + own),
        number(static_cast<int64_t>(blockIdx.x) / kBlocks),
        row(number / sizes.H),
        n_embd(sizes.H * kSize),
        head_first(number % sizes.H * kSize),
        first(row * sizes.T * n_embd + head_first) {}

  int part;        // of the line
  int own;         // the line's place among the block's
  int line;        // of the head's state
  int64_t number;  // of the head, over all batch rows
  int64_t row;     // of the batch
  int64_t n_embd;
  int64_t head_first;  // channel of the head
  int64_t first;       // element of the head's first channel in a tensor, of the row's first token
  __device__ __forceinline__ int first_line() const { return line - own; }
};

// Calls work(e, four) for the thread's 32 numbers, four neighbours at a time: numbers e ... e + 3
// of its own are numbers four ... four + 3 of the line.
template <int kSize, typename Work>
__device__ __forceinline__ void for_own_fours(int part, const Work& work) {
#pragma unroll
  for (int e = 0; e < kPerLane; e += 4) {
    work(e, e * Place<kSize>::kParts + part * 4);
  }
}
__device__ __forceinline__ void load4(const float* from, float (&x)[4]) {
  const float4 packed = *reinterpret_cast<const float4*>(from);
  x[0] = packed.x, x[1] = packed.y, x[2] = packed.z, x[3] = packed.w;
}

// The sum of a line's parts, the same bits in all of its lanes.
template <int kParts>
__device__ __forceinline__ float line_sum(float x) {
#pragma unroll
  for (int distance = kParts / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
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

__device__ __forceinline__ int smaller(int64_t x, int y) {
  return x < y ? static_cast<int>(x) : y;
}

// One token's way through a line: m = m decay + first first_keys + second second_keys; the sums of
// m with both queries.
template <int kSize>
__device__ __forceinline__ void advance(float (&line)[kPerLane],
                                        int part,
                                        const float* decay,
                                        float first,
                                        const float* first_keys,
                                        float second,
                                        const float* second_keys,
                                        const float* first_query,
                                        const float* second_query,
                                        float& first_sum,
                                        float& second_sum) {
  float first_sums[4] = {}, second_sums[4] = {};
  for_own_fours<kSize>(part, [&](int e, int four) {
    float w[4], x[4], z[4], p[4], q[4];
    load4(decay + four, w);
    load4(first_keys + four, x);
    load4(second_keys + four, z);
    load4(first_query + four, p);
    load4(second_query + four, q);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float m = line[e + i] * w[i] + first * x[i] + second * z[i];
      line[e + i] = m;
      first_sums[i] += m * p[i];
      second_sums[i] += m * q[i];
    }
  });
  constexpr int kParts = Place<kSize>::kParts;
  first_sum = line_sum<kParts>((first_sums[0] + first_sums[1]) + (first_sums[2] + first_sums[3]));
  second_sum =
      line_sum<kParts>((second_sums[0] + second_sums[1]) + (second_sums[2] + second_sums[3]));
}

template <int kSize>
__device__ __forceinline__ void set_line(float (&line)[kPerLane], float value) {
#pragma unroll
  for (int e = 0; e < kPerLane; ++e) {
    line[e] = value;
  }
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
  float S[kPerLane];
  const float* const state = x.state + at.number * kSize * kSize;
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S[e + i] = state[(four + i) * kSize + at.line];
    }
  });
  float u = 0.0f;
  for (int64_t begin = 0; begin < sizes.T; begin += kRowTokens) {
    const int tokens = smaller(sizes.T - begin, kRowTokens);
    const int64_t block_first = at.first + begin * at.n_embd;
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
      float sums[4] = {};
      for_own_fours<kSize>(at.part, [&](int e, int four) {
        float first_a[4];
        load4(a + four, first_a);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[i] += S[e + i] * first_a[i];
        }
      });
      u = line_sum<P::kParts>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    for (int token = 0; token < tokens; ++token) {
      const int64_t t = begin + token;
      if (x.carries != nullptr && t % kWkv7CarryLen == 0) {
        float* const carry =
            x.carries +
            ((at.number * (ceil_div(sizes.T, kWkv7CarryLen) + 1) + t / kWkv7CarryLen) * kSize +
             at.line) *
                kSize;
        for_own_fours<kSize>(at.part, [&](int e, int four) {
          *reinterpret_cast<float4*>(carry + four) =
              make_float4(S[e], S[e + 1], S[e + 2], S[e + 3]);
        });
      }
      if (x.in.starts != nullptr && x.in.starts[at.row * sizes.T + t]) {
        set_line<kSize>(S, 0.0f);
        u = 0.0f;
      }
      const int64_t out = block_first + token * at.n_embd + at.line;
      if (x.u != nullptr && at.part == 0) {
        x.u[out] = u;
      }
      float y = 0.0f, u_next = 0.0f;
      advance<kSize>(S,
                     at.part,
                     w + token * kSize,
                     u,
                     b + token * kSize,
                     v[token * kLines + at.own],
                     k + token * kSize,
                     r + token * kSize,
                     a + (token + 1) * kSize,
                     y,
                     u_next);
      u = u_next;
      if (at.part == 0) {
        x.y[out] = from_float<Element>(y);
      }
    }
  }
  float* const state_out = x.state_out + at.number * kSize * kSize;
  float* const carry =
      x.carries == nullptr
          ? nullptr
          : x.carries + ((at.number + 1) * (ceil_div(sizes.T, kWkv7CarryLen) + 1) * kSize - kSize +
                         at.line) *
                            kSize;
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state_out[(four + i) * kSize + at.line] = S[e + i];
    }
    if (carry != nullptr) {
      *reinterpret_cast<float4*>(carry + four) = make_float4(S[e], S[e + 1], S[e + 2], S[e + 3]);
    }
  });
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
  float D[kPerLane];
  set_line<kSize>(D, 0.0f);
  if (x.dstate_out != nullptr) {
    const float* const dstate_out = x.dstate_out + at.number * kSize * kSize;
    for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        D[e + i] = dstate_out[(four + i) * kSize + at.line];
      }
    });
  }
  float du = 0.0f;
  for (int64_t begin = (sizes.T - 1) / kRowTokens * kRowTokens; begin >= 0; begin -= kRowTokens) {
    const int tokens = smaller(sizes.T - begin, kRowTokens);
    const int64_t block_first = at.first + begin * at.n_embd;
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
    for (int token = tokens - 1; token >= 0; --token) {
      const int64_t t = begin + token;
      const bool is_last_of_document = starts != nullptr && t + 1 < sizes.T && starts[t + 1];
      if (is_last_of_document) {
        set_line<kSize>(D, 0.0f);
        du = 0.0f;
      }
      float dv = 0.0f, du_here = 0.0f;
      advance<kSize>(D,
                     at.part,
                     is_last_of_document ? no_w : w + (token + 1) * kSize,
                     du,
                     is_last_of_document ? no_a : a + (token + 1) * kSize,
                     dy[token * kLines + at.own],
                     r + token * kSize,
                     k + token * kSize,
                     b + token * kSize,
                     dv,
                     du_here);
      du = du_here;
      if (at.part == 0) {
        const int64_t out = block_first + token * at.n_embd + at.line;
        x.dv[out] = from_float<Element>(dv);
        x.du[out] = du;
      }
    }
  }
  // w and a of the first token are in shared memory still.
  const bool is_cut = starts != nullptr && starts[0];
  float* const dstate = x.dstate + at.number * kSize * kSize;
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dstate[(four + i) * kSize + at.line] =
          is_cut ? 0.0f : D[e + i] * w[four + i] + du * a[four + i];
    }
  });
}

// ---- Backward: all gradients that are sums over values ------------------------------------------

template <int kSize>
constexpr int kColumnsFloats = (4 * kColumnTokens + 1) * kSize + (6 * kColumnTokens + 2) * kLines;

// What the columns kernel has of its tokens in shared memory.
template <int kSize>
struct ColumnTokens {
  __device__ explicit ColumnTokens(float* shared)
      : v(shared),
        u(v + kColumnTokens * kSize),
        dy(u + kColumnTokens * kSize),
        du(dy + kColumnTokens * kSize),
        r(du + (kColumnTokens + 1) * kSize),
        k(r + kColumnTokens * kLines),
        b(k + kColumnTokens * kLines),
        gate(b + kColumnTokens * kLines),
        w(gate + kColumnTokens * kLines),
        a(w + (kColumnTokens + 1) * kLines) {}
  float *v, *u, *dy;        // [tokens, N]
  float* du;                // one token more
  float *r, *k, *b, *gate;  // [tokens, lines]
  float *w, *a;             // one token more
};

// A column of the state after token `last`: forward's, or made again from the last one before.
template <typename Element, int kSize>
__device__ __forceinline__ void make_column_again(const Wkv7Backward<Element>& x,
                                                  const Place<kSize>& at,
                                                  const ColumnTokens<kSize>& shared,
                                                  int64_t last,
                                                  float (&S)[kPerLane]) {
  const Wkv7Sizes& sizes = x.in.sizes;
  const int64_t num_carries = ceil_div(sizes.T, kWkv7CarryLen) + 1;
  const bool is_kept = last + 1 == sizes.T || (last + 1) % kWkv7CarryLen == 0;
  const int64_t carry_number = last + 1 == sizes.T ? num_carries - 1
                               : is_kept           ? (last + 1) / kWkv7CarryLen
                                                   : last / kWkv7CarryLen;
  const float* const carry = x.carries + (at.number * num_carries + carry_number) * kSize * kSize;
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      S[e + i] = carry[(four + i) * kSize + at.line];
    }
  });
  if (is_kept) {
    return;
  }
  for (int64_t begin = last / kWkv7CarryLen * kWkv7CarryLen; begin <= last;
       begin += kColumnTokens) {
    const int tokens = smaller(last + 1 - begin, kColumnTokens);
    const int64_t block_first = at.first + begin * at.n_embd;
    __syncthreads();
    constexpr int kThreads = Place<kSize>::kThreads;
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
      const int own = token * kLines + at.own;
      if (x.in.starts != nullptr && x.in.starts[at.row * sizes.T + begin + token]) {
        set_line<kSize>(S, 0.0f);
      }
      const float w = shared.w[own], b = shared.b[own], k = shared.k[own];
      for_own_fours<kSize>(at.part, [&](int e, int four) {
        float v[4], u[4];
        load4(shared.v + token * kSize + four, v);
        load4(shared.u + token * kSize + four, u);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          S[e + i] = S[e + i] * w + u[i] * b + v[i] * k;
        }
      });
    }
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
  const ColumnTokens<kSize> shared(static_cast<float*>(shared_memory()));
  float D[kPerLane], S[kPerLane];
  set_line<kSize>(D, 0.0f);
  if (x.dstate_out != nullptr) {
    const float* const dstate_out = x.dstate_out + (at.number * kSize + at.line) * kSize;
    for_own_fours<kSize>(at.part, [&](int e, int four) {
      float d[4];
      load4(dstate_out + four, d);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        D[e + i] = d[i];
      }
    });
  }
  float dw0 = 0.0f;
  for (int64_t begin = (sizes.T - 1) / kColumnTokens * kColumnTokens; begin >= 0;
       begin -= kColumnTokens) {
    const int tokens = smaller(sizes.T - begin, kColumnTokens);
    make_column_again<Element, kSize>(x, at, shared, begin + tokens - 1, S);
    load_column_tokens<Element, kSize>(x, at, shared, begin, tokens);
    for (int token = tokens - 1; token >= 0; --token) {
      const int64_t t = begin + token;
      const bool is_last_of_document = starts != nullptr && t + 1 < sizes.T && starts[t + 1];
      if (is_last_of_document) {
        set_line<kSize>(D, 0.0f);
        if (token + 1 < tokens) {
          // No way leads back over a start.
          make_column_again<Element, kSize>(x, at, shared, t, S);
          load_column_tokens<Element, kSize>(x, at, shared, begin, tokens);
        }
      }
      const int own = token * kLines + at.own, after = own + kLines;
      // A NaN of the next document stays there.
      const float w_after = is_last_of_document ? 1.0f : shared.w[after];
      const float a_after = shared.a[after];
      const float r = shared.r[own], k = shared.k[own], b = shared.b[own];
      const float w = shared.w[own], w_inverse = fast_reciprocal(w);
      float dr = 0.0f, dk = 0.0f, db = 0.0f, da = 0.0f, dw = 0.0f;
      for_own_fours<kSize>(at.part, [&](int e, int four) {
        float v[4], u[4], dy[4], du[4], du_after[4];
        keep_reads_behind();
        load4(shared.v + token * kSize + four, v);
        load4(shared.u + token * kSize + four, u);
        load4(shared.dy + token * kSize + four, dy);
        load4(shared.du + token * kSize + four, du);
        load4(shared.du + (token + 1) * kSize + four, du_after);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float crossing = is_last_of_document ? 0.0f : du_after[i] * a_after;
          const float d = D[e + i] * w_after + crossing + dy[i] * r;
          D[e + i] = d;
          const float s = S[e + i];
          const float s_before = (s - v[i] * k - u[i] * b) * w_inverse;
          S[e + i] = s_before;
          dr += s * dy[i];
          dk += d * v[i];
          db += d * u[i];
          da += s_before * du[i];
          dw += d * s_before;
        }
      });
      dr = line_sum<P::kParts>(dr);
      dk = line_sum<P::kParts>(dk);
      db = line_sum<P::kParts>(db);
      da = line_sum<P::kParts>(da);
      dw = line_sum<P::kParts>(dw);
      if (starts != nullptr && starts[t]) {
        // The state before it is zero, not what comes of going back.
        da = dw = 0.0f;
      }
      const float gate = shared.gate[own];
      const float dw_raw = dw * w * (gate * -kMostDecay) * (1.0f - gate);
      dw0 += dw_raw;
      if (at.part == 0) {
        const int64_t out = at.first + t * at.n_embd + at.line;
        x.dr[out] = from_float<Element>(dr);
        x.dk[out] = from_float<Element>(dk);
        x.db[out] = from_float<Element>(db);
        x.da[out] = from_float<Element>(da);
        x.dw_raw[out] = from_float<Element>(dw_raw);
      }
    }
  }
  if (at.part == 0) {
    x.dw0[at.number * kSize + at.line] = dw0;
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
