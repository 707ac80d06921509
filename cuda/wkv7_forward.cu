// wkv7, forward. Source and equations: model/ops/wkv7.h. Lines are rows of the state (values).
// Floor, multiply-adds a number of the state and token: 5.
#include "cuda/wkv7_part.cuh"

namespace rwkv::wkv7 {
namespace {

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

}  // namespace
}  // namespace rwkv::wkv7

namespace rwkv {

int64_t wkv7_carries_floats(const Wkv7Sizes& sizes) {
  return sizes.B * sizes.H * (ceil_div(sizes.T, kWkv7CarryLen) + 1) * sizes.N * sizes.N;
}

template <typename Element>
cudaError_t launch_wkv7(const Wkv7Forward<Element>& args, cudaStream_t stream) {
  if (args.in.sizes.B == 0) {
    return cudaSuccess;
  }
  return wkv7::with_head_size(args.in.sizes.N, [&](auto size) {
    return launch_kernel(&wkv7::wkv7_forward_kernel<Element, size>,
                         wkv7::shape_of<size>(args.in.sizes, wkv7::kForwardFloats<size>),
                         stream,
                         args);
  });
}

template cudaError_t launch_wkv7(const Wkv7Forward<float>&, cudaStream_t);
template cudaError_t launch_wkv7(const Wkv7Forward<__nv_bfloat16>&, cudaStream_t);

}  // namespace rwkv
