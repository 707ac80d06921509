// CPU kernels of wkv7. A thread owns one head of one batch row and walks time; all arithmetic is
// fp32 (fp64 for fp64 inputs). The state of a head (16 KB at N = 64) stays in the first cache.
//
// Forward holds the state with its values in the lanes, so that everything is vertical: one pass
// over it a token updates it, reads y off it and, as it goes by, the next token's u = S a. Five
// multiply-adds an element of the state, one load and one store.
//
// Backward goes through D, the state's gradient, in the same way (its recurrence has the same form,
// with dv and du in the places of y and u). The other gradients are sums over values, so it holds D
// a second time, and the state, with the keys in the lanes. The states come from a second forward
// walk of 64 tokens, which knows u already. 19 multiply-adds an element in all.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/state_rows.h"
#include "model/ops/wkv7.h"

namespace rwkv::ops {
namespace {

// Tokens from one saved state to the next, and from one that backward makes again to the next.
constexpr int64_t kChunkLen = 64;
constexpr int64_t kStepsBack = 8;

// log(w) = -kMostDecay sigmoid(...): e^{-1/2}.
constexpr double kMostDecay = 0.60653065971263342;

// ---- Rows ---------------------------------------------------------------------------------------

template <typename Vector>
RWKV_INLINE Vector decay_gate(Vector w0, Vector w_raw) {
  return sigmoid_lanes(w0 + w_raw);
}
template <typename Vector>
RWKV_INLINE Vector decay_of(Vector gate) {
  return exp_lanes(gate * static_cast<LaneOf<Vector>>(-kMostDecay));
}
template <typename Vector, typename Element>
RWKV_INLINE void load_decay(LaneOf<Vector>* to,
                            const Element* w_raw,
                            const LaneOf<Vector>* w0,
                            int64_t head_size) {
  for_each_vector<Vector>(head_size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector gate =
        decay_gate(load_lanes<Vector>(w0 + c, count), load_lanes<Vector>(w_raw + c, count));
    store_lanes(to + c, decay_of(gate));
  });
}

// ---- Matrices -----------------------------------------------------------------------------------

// One token's way through a matrix M of `size` rows:
//   M[j] = M[j] decay[j] + first_value first_key[j] + second_value second_key[j]
//   first_sum = sum_j M[j] first_query[j]      second_sum likewise
// All but M are rows; values and sums have lanes, keys and queries one number a row of M.
template <typename Scalar>
struct Advance {
  const Scalar *decay, *first_key, *second_key, *first_query, *second_query;
  const Scalar *first_value, *second_value;
  Scalar *first_sum, *second_sum;
};
template <int kVectors, typename Vector, typename Scalar>
RWKV_INLINE void advance_lanes(
    Scalar* matrix, int64_t size, int64_t stride, const Advance<Scalar>& a, int64_t lane) {
  Vector first_value[kVectors], second_value[kVectors], first_sum[kVectors], second_sum[kVectors];
  for (int64_t n = 0; n < kVectors; ++n) {
    first_value[n] = load_lanes<Vector>(a.first_value + lane + n * kLanes<Vector>);
    second_value[n] = load_lanes<Vector>(a.second_value + lane + n * kLanes<Vector>);
    first_sum[n] = second_sum[n] = Vector{};
  }
  for (int64_t j = 0; j < size; ++j) {
    Scalar* const row = matrix + j * stride + lane;
    for (int64_t n = 0; n < kVectors; ++n) {
      Vector m = load_lanes<Vector>(row + n * kLanes<Vector>) * a.decay[j];
      m += first_value[n] * a.first_key[j];
      m += second_value[n] * a.second_key[j];
      store_lanes(row + n * kLanes<Vector>, m);
      first_sum[n] += m * a.first_query[j];
      second_sum[n] += m * a.second_query[j];
    }
  }
  for (int64_t n = 0; n < kVectors; ++n) {
    store_lanes(a.first_sum + lane + n * kLanes<Vector>, first_sum[n]);
    store_lanes(a.second_sum + lane + n * kLanes<Vector>, second_sum[n]);
  }
}
template <typename Vector, typename Scalar>
RWKV_INLINE void advance(Scalar* matrix, int64_t size, int64_t stride, const Advance<Scalar>& a) {
  // What 32 registers have room for, or 16.
  constexpr int kMost = sizeof(Vector) == 64 ? 4 : 2;
  int64_t lane = 0;
  for (; lane + kMost * kLanes<Vector> <= stride; lane += kMost * kLanes<Vector>) {
    advance_lanes<kMost, Vector>(matrix, size, stride, a, lane);
  }
  for (; lane < stride; lane += kLanes<Vector>) {
    advance_lanes<1, Vector>(matrix, size, stride, a, lane);
  }
}

// ---- Forward ------------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct Inputs {
  const Element *r, *w_raw, *k, *v, *a, *b;
  const Scalar* w0;
  const bool* starts;  // of the batch row; null without
};

template <typename Element, typename Scalar>
struct HeadForward {
  Inputs<Element, Scalar> in;
  const Scalar* state_in;
  Element* y;
  Scalar* state_out;
  Scalar* u;       // null if not for backward
  Scalar* states;  // of this head, one a chunk
};

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void forward_head(const HeadForward<Element, Scalar>& head,
                              const HeadSizes& sizes,
                              Scratch<Scalar> scratch) {
  const int64_t N = sizes.head_size, stride = padded<Scalar>(N), step = sizes.n_embd();
  const Inputs<Element, Scalar>& in = head.in;
  Scalar* const S = scratch.rows(N);
  Scalar *const r = scratch.rows(1), *const k = scratch.rows(1), *const v = scratch.rows(1),
                *const a_next = scratch.rows(1), *const b = scratch.rows(1),
                *const w = scratch.rows(1), *const y = scratch.rows(1);
  Scalar *u = scratch.rows(1), *u_next = scratch.rows(1);
  load_matrix<Vector>(S, head.state_in, N, stride);
  // u of the first token: a way through S that leaves it as it is (v and b are zero as yet).
  std::fill_n(w, N, Scalar{1});
  load_row<Vector>(a_next, in.a, N);
  const Advance<Scalar> way{.decay = w,
                            .first_key = b,
                            .second_key = k,
                            .first_query = r,
                            .second_query = a_next,
                            .first_value = nullptr,
                            .second_value = v,
                            .first_sum = y,
                            .second_sum = nullptr};
  const auto go = [&](const Scalar* from, Scalar* to) RWKV_INLINE_LAMBDA {
    Advance<Scalar> with_u = way;
    with_u.first_value = from;
    with_u.second_sum = to;
    advance<Vector>(S, N, stride, with_u);
  };
  go(u_next, u);
  for (int64_t t = 0; t < sizes.seq_len; ++t) {
    const int64_t at = t * step;
    if (in.starts != nullptr && in.starts[t]) {
      std::fill_n(S, N * stride, Scalar{});
      std::fill_n(u, stride, Scalar{});
    }
    if (head.u != nullptr) {
      if (t % kChunkLen == 0) {
        store_matrix<Vector>(head.states + t / kChunkLen * N * N, S, N, stride);
      }
      store_row<Vector>(head.u + at, u, N);
    }
    load_row<Vector>(r, in.r + at, N);
    load_row<Vector>(k, in.k + at, N);
    load_row<Vector>(v, in.v + at, N);
    load_row<Vector>(b, in.b + at, N);
    load_decay<Vector>(w, in.w_raw + at, in.w0, N);
    if (t + 1 < sizes.seq_len) {
      load_row<Vector>(a_next, in.a + at + step, N);
    }
    go(u, u_next);
    std::swap(u, u_next);
    store_row<Vector>(head.y + at, y, N);
  }
  store_matrix<Vector>(head.state_out, S, N, stride);
}

// ---- Backward -----------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct HeadBackward {
  Inputs<Element, Scalar> in;
  const Scalar *u, *states;
  const Element* dy;
  const Scalar* dstate_out;  // null for zero
  Element *dr, *dw_raw, *dk, *dv, *da, *db;
  Scalar *dw0, *dstate_in;
};

// The rows of a token that backward is at. Those after it are the next token's, which D comes from.
template <typename Scalar>
struct TokenRows {
  Scalar *r, *k, *v, *b, *w, *u, *dy;
  Scalar *dr, *dk, *dv, *da, *db, *dw;
  Scalar *a, *du;
  Scalar *a_after, *w_after, *du_after;
};

// The state goes a token on, with the keys in the lanes and u known.
template <typename Vector, typename Scalar>
RWKV_INLINE void advance_by_keys(Scalar* S,
                                 int64_t size,
                                 int64_t stride,
                                 const TokenRows<Scalar>& x) {
  for (int64_t j = 0; j < stride; j += kLanes<Vector>) {
    const Vector w = load_lanes<Vector>(x.w + j), b = load_lanes<Vector>(x.b + j),
                 k = load_lanes<Vector>(x.k + j);
    for (int64_t i = 0; i < size; ++i) {
      Scalar* const at = S + i * stride + j;
      store_lanes(at, load_lanes<Vector>(at) * w + x.u[i] * b + x.v[i] * k);
    }
  }
}

// D, with the keys in the lanes, comes from the next token to this one; the state goes from this
// one to the one before; all sums over values.
template <typename Vector, typename Scalar>
RWKV_INLINE void go_back_by_keys(
    Scalar* D, Scalar* S, int64_t size, int64_t stride, const TokenRows<Scalar>& x) {
  for (int64_t j = 0; j < stride; j += kLanes<Vector>) {
    const Vector w_after = load_lanes<Vector>(x.w_after + j),
                 a_after = load_lanes<Vector>(x.a_after + j), r = load_lanes<Vector>(x.r + j),
                 k = load_lanes<Vector>(x.k + j), b = load_lanes<Vector>(x.b + j);
    const Vector w_inverse = 1 / load_lanes<Vector>(x.w + j);
    Vector dr = {}, dk = {}, db = {}, da = {}, dw = {};
    for (int64_t i = 0; i < size; ++i) {
      Scalar *const D_at = D + i * stride + j, *const S_at = S + i * stride + j;
      const Vector d = load_lanes<Vector>(D_at) * w_after + x.du_after[i] * a_after + x.dy[i] * r;
      store_lanes(D_at, d);
      const Vector s = load_lanes<Vector>(S_at);
      const Vector s_before = (s - x.v[i] * k - x.u[i] * b) * w_inverse;
      store_lanes(S_at, s_before);
      dr += s * x.dy[i];
      dk += d * x.v[i];
      db += d * x.u[i];
      da += s_before * x.du[i];
      dw += d * s_before;
    }
    store_lanes(x.dr + j, dr);
    store_lanes(x.dk + j, dk);
    store_lanes(x.db + j, db);
    store_lanes(x.da + j, da);
    store_lanes(x.dw + j, dw);
  }
}

// The states of a chunk at which backward takes up again what rounding has done to its own: after
// every eighth token, the last, and those before a document's start, from which no way leads back.
template <typename Scalar>
class Marks {
 public:
  Marks(const HeadSizes& sizes, const bool* starts, int64_t begin, int64_t end)
      : size_(sizes.head_size * padded<Scalar>(sizes.head_size)), begin_(begin) {
    int64_t count = 0;
    for (int64_t t = begin; t < end; ++t) {
      const bool is_before_start = starts != nullptr && t + 1 < sizes.seq_len && starts[t + 1];
      const bool is_mark = (t + 1 - begin) % kStepsBack == 0 || t + 1 == end || is_before_start;
      number_[t - begin] = is_mark ? count++ : -1;
    }
    states_ = at::empty({count * size_}, c10::CppTypeToScalarType<Scalar>::value);
  }
  bool has(int64_t t) const { return number_[t - begin_] >= 0; }
  Scalar* after(int64_t t) {
    return states_.mutable_data_ptr<Scalar>() + number_[t - begin_] * size_;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_, begin_;
  int64_t number_[kChunkLen];
  at::Tensor states_;
};

// Walks a chunk forward and keeps the marked states.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void keep_marks(const HeadBackward<Element, Scalar>& head,
                            const HeadSizes& sizes,
                            Scalar* S,
                            const TokenRows<Scalar>& x,
                            int64_t begin,
                            int64_t end,
                            Marks<Scalar>& marks) {
  const int64_t N = sizes.head_size, stride = padded<Scalar>(N);
  load_transposed(S, head.states + begin / kChunkLen * N * N, N, stride);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t at = t * sizes.n_embd();
    if (head.in.starts != nullptr && head.in.starts[t]) {
      std::fill_n(S, N * stride, Scalar{});
    }
    load_row<Vector>(x.k, head.in.k + at, N);
    load_row<Vector>(x.v, head.in.v + at, N);
    load_row<Vector>(x.b, head.in.b + at, N);
    load_row<Vector>(x.u, head.u + at, N);
    load_decay<Vector>(x.w, head.in.w_raw + at, head.in.w0, N);
    advance_by_keys<Vector>(S, N, stride, x);
    if (marks.has(t)) {
      std::copy_n(S, marks.size(), marks.after(t));
    }
  }
}

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void store_gradients(const HeadBackward<Element, Scalar>& head,
                                 const TokenRows<Scalar>& x,
                                 int64_t at,
                                 int64_t head_size) {
  store_row<Vector>(head.dr + at, x.dr, head_size);
  store_row<Vector>(head.dk + at, x.dk, head_size);
  store_row<Vector>(head.dv + at, x.dv, head_size);
  store_row<Vector>(head.da + at, x.da, head_size);
  store_row<Vector>(head.db + at, x.db, head_size);
  for_each_vector<Vector>(head_size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector gate = decay_gate(load_lanes<Vector>(head.in.w0 + c, count),
                                   load_lanes<Vector>(head.in.w_raw + at + c, count));
    const Vector dw_raw = load_lanes<Vector>(x.dw + c) * load_lanes<Vector>(x.w + c) *
                          (gate * static_cast<Scalar>(-kMostDecay)) * (1 - gate);
    store_lanes(head.dw_raw + at + c, dw_raw, count);
    store_lanes(head.dw0 + c, load_lanes<Vector>(head.dw0 + c, count) + dw_raw, count);
  });
}

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void backward_head(const HeadBackward<Element, Scalar>& head,
                               const HeadSizes& sizes,
                               Scratch<Scalar> scratch) {
  const int64_t N = sizes.head_size, stride = padded<Scalar>(N), step = sizes.n_embd();
  const bool* const starts = head.in.starts;
  Scalar *const S_walk = scratch.rows(N), *const D_by_keys = scratch.rows(N),
                *const D = scratch.rows(N);
  TokenRows<Scalar> x{};
  for (Scalar** const row : {&x.r,
                             &x.k,
                             &x.v,
                             &x.b,
                             &x.w,
                             &x.u,
                             &x.dy,
                             &x.dr,
                             &x.dk,
                             &x.dv,
                             &x.da,
                             &x.db,
                             &x.dw,
                             &x.a,
                             &x.du,
                             &x.a_after,
                             &x.w_after,
                             &x.du_after}) {
    *row = scratch.rows(1);
  }
  std::fill_n(x.w_after, N, Scalar{1});
  if (head.dstate_out != nullptr) {
    load_matrix<Vector>(D, head.dstate_out, N, stride);
    load_transposed(D_by_keys, head.dstate_out, N, stride);
  }
  std::fill_n(head.dw0, N, Scalar{});
  for (int64_t chunk = sizes.num_chunks() - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunkLen;
    const int64_t end = std::min(begin + kChunkLen, sizes.seq_len);
    Marks<Scalar> marks(sizes, starts, begin, end);
    keep_marks<Vector>(head, sizes, S_walk, x, begin, end, marks);
    Scalar* S = nullptr;
    for (int64_t t = end - 1; t >= begin; --t) {
      const int64_t at = t * step;
      if (marks.has(t)) {
        S = marks.after(t);
      }
      load_row<Vector>(x.r, head.in.r + at, N);
      load_row<Vector>(x.k, head.in.k + at, N);
      load_row<Vector>(x.v, head.in.v + at, N);
      load_row<Vector>(x.a, head.in.a + at, N);
      load_row<Vector>(x.b, head.in.b + at, N);
      load_row<Vector>(x.u, head.u + at, N);
      load_row<Vector>(x.dy, head.dy + at, N);
      load_decay<Vector>(x.w, head.in.w_raw + at, head.in.w0, N);
      if (starts != nullptr && t + 1 < sizes.seq_len && starts[t + 1]) {
        std::fill_n(D, N * stride, Scalar{});
        std::fill_n(D_by_keys, N * stride, Scalar{});
        std::fill_n(x.w_after, N, Scalar{1});
        std::fill_n(x.a_after, N, Scalar{});
        std::fill_n(x.du_after, N, Scalar{});
      }
      advance<Vector>(D,
                      N,
                      stride,
                      Advance<Scalar>{.decay = x.w_after,
                                      .first_key = x.a_after,
                                      .second_key = x.r,
                                      .first_query = x.k,
                                      .second_query = x.b,
                                      .first_value = x.du_after,
                                      .second_value = x.dy,
                                      .first_sum = x.dv,
                                      .second_sum = x.du});
      go_back_by_keys<Vector>(D_by_keys, S, N, stride, x);
      if (starts != nullptr && starts[t]) {
        // The state before it is zero, not what comes of going back.
        std::fill_n(x.da, N, Scalar{});
        std::fill_n(x.dw, N, Scalar{});
      }
      store_gradients<Vector>(head, x, at, N);
      std::swap(x.a, x.a_after);
      std::swap(x.w, x.w_after);
      std::swap(x.du, x.du_after);
    }
  }
  if (starts != nullptr && starts[0]) {
    std::fill_n(head.dstate_in, N * N, Scalar{});
    return;
  }
  // The last step alone: nothing is read off any more, and no gradient comes in.
  std::fill_n(x.dy, N, Scalar{});
  advance<Vector>(D,
                  N,
                  stride,
                  Advance<Scalar>{.decay = x.w_after,
                                  .first_key = x.a_after,
                                  .second_key = x.r,
                                  .first_query = x.k,
                                  .second_query = x.b,
                                  .first_value = x.du_after,
                                  .second_value = x.dy,
                                  .first_sum = x.dv,
                                  .second_sum = x.du});
  store_matrix<Vector>(head.dstate_in, D, N, stride);
}

// ---- Tensors to pointers ------------------------------------------------------------------------

struct InputTensors {
  const at::Tensor &r, &w_raw, &k, &v, &a, &b, &w0;
  const std::optional<at::Tensor>& starts;
  HeadSizes sizes;
};

// Calls `work(a vector, row, head, inputs, index of the first channel)` for each head of each batch
// row, in parallel.
template <typename Element, typename Work>
void for_each_head(const InputTensors& in, const Work& work) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const auto *r = data_of<Element>(in.r), *w_raw = data_of<Element>(in.w_raw),
             *k = data_of<Element>(in.k), *v = data_of<Element>(in.v), *a = data_of<Element>(in.a),
             *b = data_of<Element>(in.b);
  const auto* w0 = data_of<Scalar>(in.w0);
  const bool* starts = in.starts ? data_of<bool>(*in.starts) : nullptr;
  at::parallel_for(0, sizes.batch_size * sizes.num_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t row = number / sizes.num_heads, head = number % sizes.num_heads;
      const int64_t at = row * sizes.seq_len * sizes.n_embd() + head * sizes.head_size;
      const Inputs<Element, Scalar> inputs{.r = r + at,
                                           .w_raw = w_raw + at,
                                           .k = k + at,
                                           .v = v + at,
                                           .a = a + at,
                                           .b = b + at,
                                           .w0 = w0 + head * sizes.head_size,
                                           .starts = moved(starts, row * sizes.seq_len)};
      with_vectors<Scalar>([&](auto vector)
                               RWKV_INLINE_LAMBDA { work(vector, row, head, inputs, at); });
    }
  });
}

template <typename Element>
void forward(const InputTensors& in,
             const at::Tensor& state_BHNN,
             const at::Tensor& y_BTC,
             const at::Tensor& state_out_BHNN,
             const at::Tensor& u_BTC,
             const at::Tensor& states) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const int64_t N = sizes.head_size;
  const auto* state_in = data_of<Scalar>(state_BHNN);
  auto* y = mutable_data_of<Element>(y_BTC);
  auto* state_out = mutable_data_of<Scalar>(state_out_BHNN);
  auto* u = u_BTC.numel() > 0 ? mutable_data_of<Scalar>(u_BTC) : nullptr;
  auto* saved = u == nullptr ? nullptr : mutable_data_of<Scalar>(states);
  for_each_head<Element>(
      in,
      [&]<typename Vector>(
          As<Vector>, int64_t row, int64_t head, const Inputs<Element, Scalar>& inputs, int64_t at)
          RWKV_INLINE_LAMBDA {
            const int64_t number = row * sizes.num_heads + head;
            forward_head<Vector>(
                HeadForward<Element, Scalar>{
                    .in = inputs,
                    .state_in = state_in + number * N * N,
                    .y = y + at,
                    .state_out = state_out + number * N * N,
                    .u = moved(u, at),
                    .states = moved(saved, number * sizes.num_chunks() * N * N)},
                sizes,
                Scratch<Scalar>(N + 9, padded<Scalar>(N)));
          });
}

struct Gradients {
  at::Tensor dr, dw_raw, dk, dv, da, db;
  at::Tensor dw0_BC, dstate_BHNN;
};

template <typename Element>
void backward(const InputTensors& in,
              const at::Tensor& u_BTC,
              const at::Tensor& states,
              const at::Tensor& dy_BTC,
              const std::optional<at::Tensor>& dstate_out_BHNN,
              const Gradients& out) {
  using Scalar = ScalarOf<Element>;
  const HeadSizes& sizes = in.sizes;
  const int64_t N = sizes.head_size;
  const auto *u = data_of<Scalar>(u_BTC), *saved = data_of<Scalar>(states);
  const auto* dy = data_of<Element>(dy_BTC);
  const auto* dstate_out = dstate_out_BHNN ? data_of<Scalar>(*dstate_out_BHNN) : nullptr;
  auto *dr = mutable_data_of<Element>(out.dr), *dw_raw = mutable_data_of<Element>(out.dw_raw),
       *dk = mutable_data_of<Element>(out.dk), *dv = mutable_data_of<Element>(out.dv),
       *da = mutable_data_of<Element>(out.da), *db = mutable_data_of<Element>(out.db);
  auto *dw0 = mutable_data_of<Scalar>(out.dw0_BC),
       *dstate_in = mutable_data_of<Scalar>(out.dstate_BHNN);
  for_each_head<Element>(
      in,
      [&]<typename Vector>(
          As<Vector>, int64_t row, int64_t head, const Inputs<Element, Scalar>& inputs, int64_t at)
          RWKV_INLINE_LAMBDA {
            const int64_t number = row * sizes.num_heads + head;
            backward_head<Vector>(
                HeadBackward<Element, Scalar>{.in = inputs,
                                              .u = u + at,
                                              .states = saved + number * sizes.num_chunks() * N * N,
                                              .dy = dy + at,
                                              .dstate_out = moved(dstate_out, number * N * N),
                                              .dr = dr + at,
                                              .dw_raw = dw_raw + at,
                                              .dk = dk + at,
                                              .dv = dv + at,
                                              .da = da + at,
                                              .db = db + at,
                                              .dw0 = dw0 + number * N,
                                              .dstate_in = dstate_in + number * N * N},
                sizes,
                Scratch<Scalar>(3 * N + 18, padded<Scalar>(N)));
          });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv7_cpu(
    const at::Tensor& r_BTC,
    const at::Tensor& w_raw_BTC,
    const at::Tensor& k_BTC,
    const at::Tensor& v_BTC,
    const at::Tensor& a_BTC,
    const at::Tensor& b_BTC,
    const at::Tensor& w0_C,
    const at::Tensor& state_BHNN,
    const std::optional<at::Tensor>& starts_BT,
    bool for_backward) {
  const HeadSizes sizes = head_sizes_of(r_BTC, state_BHNN.size(1), kChunkLen);
  const at::TensorOptions exact = state_BHNN.options().requires_grad(false);
  const at::Tensor y_BTC = at::empty_like(r_BTC);
  at::Tensor u_BTC = at::empty({0}, exact), states = at::empty({0}, exact);
  const at::Tensor state_out_BHNN = at::empty(state_BHNN.sizes(), exact);
  if (for_backward) {
    u_BTC = at::empty(r_BTC.sizes(), exact);
    states = at::empty(
        {sizes.batch_size, sizes.num_heads, sizes.num_chunks(), sizes.head_size, sizes.head_size},
        exact);
  }
  const auto kernel = r_BTC.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : r_BTC.scalar_type() == at::kFloat  ? &forward<float>
                                                           : &forward<double>;
  kernel({r_BTC, w_raw_BTC, k_BTC, v_BTC, a_BTC, b_BTC, w0_C, starts_BT, sizes},
         state_BHNN,
         y_BTC,
         state_out_BHNN,
         u_BTC,
         states);
  return {y_BTC, state_out_BHNN, u_BTC, states};
}

std::tuple<at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor>
wkv7_backward_cpu(const at::Tensor& r_BTC,
                  const at::Tensor& w_raw_BTC,
                  const at::Tensor& k_BTC,
                  const at::Tensor& v_BTC,
                  const at::Tensor& a_BTC,
                  const at::Tensor& b_BTC,
                  const at::Tensor& w0_C,
                  const at::Tensor& u_BTC,
                  const at::Tensor& states,
                  const std::optional<at::Tensor>& starts_BT,
                  const at::Tensor& dy_BTC,
                  const std::optional<at::Tensor>& dstate_out_BHNN) {
  const HeadSizes sizes = head_sizes_of(r_BTC, states.size(1), kChunkLen);
  const Gradients out{
      .dr = at::empty_like(r_BTC),
      .dw_raw = at::empty_like(r_BTC),
      .dk = at::empty_like(r_BTC),
      .dv = at::empty_like(r_BTC),
      .da = at::empty_like(r_BTC),
      .db = at::empty_like(r_BTC),
      .dw0_BC = at::empty({sizes.batch_size, sizes.n_embd()}, states.options()),
      .dstate_BHNN = at::empty(
          {sizes.batch_size, sizes.num_heads, sizes.head_size, sizes.head_size}, states.options())};
  const auto kernel = r_BTC.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : r_BTC.scalar_type() == at::kFloat  ? &backward<float>
                                                           : &backward<double>;
  kernel({r_BTC, w_raw_BTC, k_BTC, v_BTC, a_BTC, b_BTC, w0_C, starts_BT, sizes},
         u_BTC,
         states,
         dy_BTC,
         dstate_out_BHNN,
         out);
  return {out.dr,
          out.dw_raw,
          out.dk,
          out.dv,
          out.da,
          out.db,
          sum_in_order(out.dw0_BC),
          out.dstate_BHNN};
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("wkv7", &wkv7_cpu);
  library.impl("wkv7_backward", &wkv7_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
