// wkv7, backward. Source and equations: model/ops/wkv7.h.
//
// Lines are rows (values) in backward_rows, which goes back through D in the way that forward goes
// through S, and leaves dv and du. They are columns (keys) in backward_columns, which has the sums
// over values: it goes back through D once more, with du known, and through the states: from one
// that forward kept every 32 tokens, or made again on the way to the next, eight steps back by
// dividing by w.
//
// Floor, multiply-adds a number of the state and token: 5 and 11, and 2.25 for the states made
// again.
#include "cuda/wkv7_part.cuh"

namespace rwkv::wkv7 {
namespace {

constexpr int kColumnTokens = 8;
// Of a multiprocessor, at least: up to 255 registers each.
constexpr int kColumnThreadsAtOnce = 256;

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

template <int kSize, typename Element>
cudaError_t launch_both(const Wkv7Backward<Element>& args, cudaStream_t stream) {
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
}  // namespace rwkv::wkv7

namespace rwkv {

template <typename Element>
cudaError_t launch_wkv7_backward(const Wkv7Backward<Element>& args, cudaStream_t stream) {
  if (args.in.sizes.B == 0) {
    return cudaSuccess;
  }
  return wkv7::with_head_size(args.in.sizes.N,
                              [&](auto size) { return wkv7::launch_both<size>(args, stream); });
}

template cudaError_t launch_wkv7_backward(const Wkv7Backward<float>&, cudaStream_t);
template cudaError_t launch_wkv7_backward(const Wkv7Backward<__nv_bfloat16>&, cudaStream_t);

}  // namespace rwkv
