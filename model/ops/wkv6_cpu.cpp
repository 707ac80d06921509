// CPU kernels of wkv6. A thread owns one head of one batch row and walks time; all arithmetic is
// fp32 (fp64 for fp64 inputs). The state of a head (16 KB at N = 64) stays in the first cache.
//
// Forward holds the state with its values in the lanes, so that everything is vertical. Most of
// backward's gradients are sums over values, so it holds the states and their gradient D with the
// keys in the lanes; dv alone is a sum over lanes. The states before each of 16 tokens (272 KB at
// N = 64) come from a second forward walk.
#include <algorithm>
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/state_rows.h"
#include "model/ops/wkv6.h"

namespace rwkv::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Tokens from one saved state to the next.
constexpr int64_t kChunkLen = 16;

// load_transposed's way back.
template <typename Scalar>
RWKV_INLINE void store_transposed(Scalar* to, const Scalar* from, int64_t size, int64_t stride) {
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t j = 0; j < size; ++j) {
      to[j * size + i] = from[i * stride + j];
    }
  }
}

template <typename Element, typename Scalar>
struct Inputs {
  const Element *r, *w_raw, *k, *v;  // w_raw null: w0 alone
  const Scalar *w0, *u;
  const bool* starts;  // of the batch row; null without
};

// Row w of a token and, if not null, log w.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void load_decay(
    Scalar* w, Scalar* w_log, const Inputs<Element, Scalar>& in, int64_t at, int64_t head_size) {
  for_each_vector<Vector>(head_size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Vector raw = load_lanes<Vector>(in.w0 + c, count);
    if (in.w_raw != nullptr) {
      raw += load_lanes<Vector>(in.w_raw + at + c, count);
    }
    // exp(-exp(8)) is zero already, in fp64, too; beyond, zero times infinity would be the
    // gradient.
    raw = raw > 8 ? Vector{} + 8 : raw;
    const Vector log = -exp_lanes(raw);
    store_lanes(w + c, exp_lanes(log));
    if (w_log != nullptr) {
      store_lanes(w_log + c, log);
    }
  });
}

// ---- Forward ------------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct HeadForward {
  Inputs<Element, Scalar> in;
  const Scalar* state_in;
  Element* y;
  Scalar* state_out;
  Scalar* states;  // of this head, one a chunk; null if not for backward
};

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void forward_head(const HeadForward<Element, Scalar>& head,
                              const HeadSizes& sizes,
                              Scratch<Scalar> scratch) {
  const int64_t N = sizes.head_size, stride = padded<Scalar>(N), step = sizes.n_embd();
  const Inputs<Element, Scalar>& in = head.in;
  Scalar* const S = scratch.rows(N);
  Scalar *const r = scratch.rows(1), *const k = scratch.rows(1), *const v = scratch.rows(1),
                *const w = scratch.rows(1), *const y = scratch.rows(1);
  load_matrix<Vector>(S, head.state_in, N, stride);
  load_decay<Vector, Element, Scalar>(w, nullptr, in, 0, N);
  for (int64_t t = 0; t < sizes.seq_len; ++t) {
    const int64_t at = t * step;
    if (in.starts != nullptr && in.starts[t]) {
      std::fill_n(S, N * stride, Scalar{});
    }
    if (head.states != nullptr && t % kChunkLen == 0) {
      store_matrix<Vector>(head.states + t / kChunkLen * N * N, S, N, stride);
    }
    load_row<Vector>(r, in.r + at, N);
    load_row<Vector>(k, in.k + at, N);
    load_row<Vector>(v, in.v + at, N);
    if (in.w_raw != nullptr) {
      load_decay<Vector, Element, Scalar>(w, nullptr, in, at, N);
    }
    Scalar bonus = 0;
    for (int64_t i = 0; i < N; ++i) {
      bonus += r[i] * in.u[i] * k[i];
    }
    for (int64_t j = 0; j < stride; j += kLanes<Vector>) {
      const Vector v_j = load_lanes<Vector>(v + j);
      Vector sum = v_j * bonus;
      for (int64_t i = 0; i < N; ++i) {
        Scalar* const at_ij = S + i * stride + j;
        const Vector s = load_lanes<Vector>(at_ij);
        sum += s * r[i];
        store_lanes(at_ij, s * w[i] + v_j * k[i]);
      }
      store_lanes(y + j, sum);
    }
    store_row<Vector>(head.y + at, y, N);
  }
  store_matrix<Vector>(head.state_out, S, N, stride);
}

// ---- Backward -----------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct HeadBackward {
  Inputs<Element, Scalar> in;
  const Scalar* states;
  const Element* dy;
  const Scalar* dstate_out;        // null for zero
  Element *dr, *dw_raw, *dk, *dv;  // dw_raw null as w_raw
  Scalar *dw0, *du, *dstate_in;
};

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void backward_head(const HeadBackward<Element, Scalar>& head,
                               const HeadSizes& sizes,
                               Scratch<Scalar> scratch) {
  const int64_t N = sizes.head_size, stride = padded<Scalar>(N), step = sizes.n_embd();
  const Inputs<Element, Scalar>& in = head.in;
  Scalar *const D = scratch.rows(N), *const before = scratch.rows(kChunkLen * N);
  Scalar *const r = scratch.rows(1), *const k = scratch.rows(1), *const v = scratch.rows(1),
                *const dy = scratch.rows(1), *const w = scratch.rows(1),
                *const w_log = scratch.rows(1), *const u = scratch.rows(1);
  Scalar *const dr = scratch.rows(1), *const dk = scratch.rows(1), *const dv = scratch.rows(1),
                *const dw = scratch.rows(1), *const dw0 = scratch.rows(1),
                *const du = scratch.rows(1);
  load_row<Vector>(u, in.u, N);
  load_decay<Vector, Element, Scalar>(w, w_log, in, 0, N);
  if (head.dstate_out != nullptr) {
    load_transposed(D, head.dstate_out, N, stride);
  }
  const auto is_start = [&](int64_t t)
                            RWKV_INLINE_LAMBDA { return in.starts != nullptr && in.starts[t]; };
  for (int64_t chunk = sizes.num_chunks() - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunkLen;
    const int64_t end = std::min(begin + kChunkLen, sizes.seq_len);
    load_transposed(before, head.states + chunk * N * N, N, stride);
    for (int64_t t = begin; t + 1 < end; ++t) {
      const Scalar* const S = before + (t - begin) * N * stride;
      Scalar* const S_after = before + (t + 1 - begin) * N * stride;
      if (is_start(t + 1)) {
        std::fill_n(S_after, N * stride, Scalar{});
        continue;
      }
      load_row<Vector>(k, in.k + t * step, N);
      load_row<Vector>(v, in.v + t * step, N);
      if (in.w_raw != nullptr) {
        load_decay<Vector, Element, Scalar>(w, w_log, in, t * step, N);
      }
      for (int64_t i = 0; i < stride; i += kLanes<Vector>) {
        const Vector w_i = load_lanes<Vector>(w + i), k_i = load_lanes<Vector>(k + i);
        for (int64_t j = 0; j < N; ++j) {
          store_lanes(S_after + j * stride + i,
                      load_lanes<Vector>(S + j * stride + i) * w_i + k_i * v[j]);
        }
      }
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t at = t * step;
      const Scalar* const S = before + (t - begin) * N * stride;
      load_row<Vector>(r, in.r + at, N);
      load_row<Vector>(k, in.k + at, N);
      load_row<Vector>(v, in.v + at, N);
      load_row<Vector>(dy, head.dy + at, N);
      if (in.w_raw != nullptr) {
        load_decay<Vector, Element, Scalar>(w, w_log, in, at, N);
      }
      Scalar q = 0, bonus = 0;
      for (int64_t i = 0; i < N; ++i) {
        q += v[i] * dy[i];
        bonus += u[i] * r[i] * k[i];
      }
      for (int64_t j = 0; j < N; ++j) {
        dv[j] = dy[j] * bonus;
      }
      for (int64_t i = 0; i < stride; i += kLanes<Vector>) {
        const Vector r_i = load_lanes<Vector>(r + i), k_i = load_lanes<Vector>(k + i),
                     w_i = load_lanes<Vector>(w + i), u_i = load_lanes<Vector>(u + i);
        Vector sum_r = u_i * k_i * q, sum_k = u_i * r_i * q, sum_w = {};
        for (int64_t j = 0; j < N; ++j) {
          Scalar* const D_ij = D + j * stride + i;
          const Vector d = load_lanes<Vector>(D_ij), s = load_lanes<Vector>(S + j * stride + i);
          sum_r += s * dy[j];
          sum_k += d * v[j];
          sum_w += d * s;
          dv[j] += sum_of_lanes(d * k_i);
          store_lanes(D_ij, d * w_i + r_i * dy[j]);
        }
        store_lanes(dr + i, sum_r);
        store_lanes(dk + i, sum_k);
        store_lanes(du + i, load_lanes<Vector>(du + i) + r_i * k_i * q);
        // The state before a start is zero, whatever D is.
        sum_w = is_start(t) ? Vector{} : sum_w * w_i * load_lanes<Vector>(w_log + i);
        store_lanes(dw + i, sum_w);
        store_lanes(dw0 + i, load_lanes<Vector>(dw0 + i) + sum_w);
      }
      if (is_start(t)) {
        std::fill_n(D, N * stride, Scalar{});
      }
      store_row<Vector>(head.dr + at, dr, N);
      store_row<Vector>(head.dk + at, dk, N);
      store_row<Vector>(head.dv + at, dv, N);
      if (head.dw_raw != nullptr) {
        store_row<Vector>(head.dw_raw + at, dw, N);
      }
    }
  }
  store_row<Vector>(head.dw0, dw0, N);
  store_row<Vector>(head.du, du, N);
  store_transposed(head.dstate_in, D, N, stride);
}

// ---- Tensors to pointers ------------------------------------------------------------------------

struct InputTensors {
  const at::Tensor& r;
  const OptionalTensor& w_raw;
  const at::Tensor &k, &v, &w0, &u;
  const OptionalTensor& starts;
  HeadSizes sizes;
};

// Calls `work(a vector, number of the head, inputs, index of the first channel)` for each head of
// each batch row, in parallel.
template <typename Element, typename Work>
void for_each_head(const InputTensors& in, const Work& work) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const auto *r = data_of<Element>(in.r), *k = data_of<Element>(in.k), *v = data_of<Element>(in.v);
  const auto* w_raw = in.w_raw ? data_of<Element>(*in.w_raw) : nullptr;
  const auto *w0 = data_of<Scalar>(in.w0), *u = data_of<Scalar>(in.u);
  const bool* starts = in.starts ? data_of<bool>(*in.starts) : nullptr;
  at::parallel_for(0, sizes.batch_size * sizes.num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / sizes.num_heads;
      const int64_t channel = number % sizes.num_heads * sizes.head_size;
      const int64_t at = row * sizes.seq_len * sizes.n_embd() + channel;
      const Inputs<Element, Scalar> inputs{.r = r + at,
                                           .w_raw = moved(w_raw, at),
                                           .k = k + at,
                                           .v = v + at,
                                           .w0 = w0 + channel,
                                           .u = u + channel,
                                           .starts = moved(starts, row * sizes.seq_len)};
      with_vectors<Scalar>([&](auto vector)
                               RWKV_INLINE_LAMBDA { work(vector, number, inputs, at); });
    }
  });
}

template <typename Element>
void forward(const InputTensors& in,
             const at::Tensor& state_BHNN,
             const at::Tensor& y_BTC,
             const at::Tensor& state_out_BHNN,
             const at::Tensor& states) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const int64_t N = sizes.head_size;
  const auto* state_in = data_of<Scalar>(state_BHNN);
  auto* y = mutable_data_of<Element>(y_BTC);
  auto* state_out = mutable_data_of<Scalar>(state_out_BHNN);
  auto* saved = states.numel() > 0 ? mutable_data_of<Scalar>(states) : nullptr;
  for_each_head<Element>(
      in,
      [&]<typename Vector>(
          As<Vector>, int64_t number, const Inputs<Element, Scalar>& inputs, int64_t at)
          RWKV_INLINE_LAMBDA {
            forward_head<Vector>(
                HeadForward<Element, Scalar>{
                    .in = inputs,
                    .state_in = state_in + number * N * N,
                    .y = y + at,
                    .state_out = state_out + number * N * N,
                    .states = moved(saved, number * sizes.num_chunks() * N * N)},
                sizes,
                Scratch<Scalar>(N + 5, padded<Scalar>(N)));
          });
}

struct Gradients {
  at::Tensor dr, dw_raw, dk, dv;  // dw_raw is empty as w_raw
  at::Tensor dw0_BC, du_BC, dstate_BHNN;
};

template <typename Element>
void backward(const InputTensors& in,
              const at::Tensor& states,
              const at::Tensor& dy_BTC,
              const OptionalTensor& dstate_out_BHNN,
              const Gradients& out) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const int64_t N = sizes.head_size;
  const auto* saved = data_of<Scalar>(states);
  const auto* dy = data_of<Element>(dy_BTC);
  const auto* dstate_out = dstate_out_BHNN ? data_of<Scalar>(*dstate_out_BHNN) : nullptr;
  auto *dr = mutable_data_of<Element>(out.dr), *dk = mutable_data_of<Element>(out.dk),
       *dv = mutable_data_of<Element>(out.dv);
  auto* dw_raw = in.w_raw ? mutable_data_of<Element>(out.dw_raw) : nullptr;
  auto *dw0 = mutable_data_of<Scalar>(out.dw0_BC), *du = mutable_data_of<Scalar>(out.du_BC),
       *dstate_in = mutable_data_of<Scalar>(out.dstate_BHNN);
  for_each_head<Element>(
      in,
      [&]<typename Vector>(
          As<Vector>, int64_t number, const Inputs<Element, Scalar>& inputs, int64_t at)
          RWKV_INLINE_LAMBDA {
            backward_head<Vector>(
                HeadBackward<Element, Scalar>{.in = inputs,
                                              .states = saved + number * sizes.num_chunks() * N * N,
                                              .dy = dy + at,
                                              .dstate_out = moved(dstate_out, number * N * N),
                                              .dr = dr + at,
                                              .dw_raw = moved(dw_raw, at),
                                              .dk = dk + at,
                                              .dv = dv + at,
                                              .dw0 = dw0 + number * N,
                                              .du = du + number * N,
                                              .dstate_in = dstate_in + number * N * N},
                sizes,
                Scratch<Scalar>((1 + kChunkLen) * N + 13, padded<Scalar>(N)));
          });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv6_cpu(const at::Tensor& r_BTC,
                                                        const OptionalTensor& w_raw_BTC,
                                                        const at::Tensor& k_BTC,
                                                        const at::Tensor& v_BTC,
                                                        const at::Tensor& w0_C,
                                                        const at::Tensor& u_C,
                                                        const at::Tensor& state_BHNN,
                                                        const OptionalTensor& starts_BT,
                                                        bool for_backward) {
  const HeadSizes sizes = head_sizes_of(r_BTC, state_BHNN.size(1), kChunkLen);
  const at::TensorOptions exact = state_BHNN.options().requires_grad(false);
  const at::Tensor y_BTC = at::empty_like(r_BTC);
  const at::Tensor state_out_BHNN = at::empty(state_BHNN.sizes(), exact);
  const at::Tensor states = at::empty({for_backward ? sizes.batch_size : 0,
                                       sizes.num_heads,
                                       sizes.num_chunks(),
                                       sizes.head_size,
                                       sizes.head_size},
                                      exact);
  const auto kernel = r_BTC.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : r_BTC.scalar_type() == at::kFloat  ? &forward<float>
                                                           : &forward<double>;
  kernel({r_BTC, w_raw_BTC, k_BTC, v_BTC, w0_C, u_C, starts_BT, sizes},
         state_BHNN,
         y_BTC,
         state_out_BHNN,
         states);
  return {y_BTC, state_out_BHNN, states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv6_backward_cpu(const at::Tensor& r_BTC,
                  const OptionalTensor& w_raw_BTC,
                  const at::Tensor& k_BTC,
                  const at::Tensor& v_BTC,
                  const at::Tensor& w0_C,
                  const at::Tensor& u_C,
                  const at::Tensor& states,
                  const OptionalTensor& starts_BT,
                  const at::Tensor& dy_BTC,
                  const OptionalTensor& dstate_out_BHNN) {
  const HeadSizes sizes = head_sizes_of(r_BTC, states.size(1), kChunkLen);
  const Gradients out{
      .dr = at::empty_like(r_BTC),
      .dw_raw = w_raw_BTC ? at::empty_like(r_BTC) : at::empty({0}, r_BTC.options()),
      .dk = at::empty_like(r_BTC),
      .dv = at::empty_like(r_BTC),
      .dw0_BC = at::empty({sizes.batch_size, sizes.n_embd()}, states.options()),
      .du_BC = at::empty({sizes.batch_size, sizes.n_embd()}, states.options()),
      .dstate_BHNN = at::empty(
          {sizes.batch_size, sizes.num_heads, sizes.head_size, sizes.head_size}, states.options())};
  const auto kernel = r_BTC.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : r_BTC.scalar_type() == at::kFloat  ? &backward<float>
                                                           : &backward<double>;
  kernel({r_BTC, w_raw_BTC, k_BTC, v_BTC, w0_C, u_C, starts_BT, sizes},
         states,
         dy_BTC,
         dstate_out_BHNN,
         out);
  return {out.dr,
          out.dw_raw,
          out.dk,
          out.dv,
          sum_in_order(out.dw0_BC),
          sum_in_order(out.du_BC),
          out.dstate_BHNN};
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("wkv6", &wkv6_cpu);
  library.impl("wkv6_backward", &wkv6_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
