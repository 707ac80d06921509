// CPU kernels of wkv4. A thread owns one batch row and one vector of channels and walks time; all
// arithmetic is fp32 (fp64 for fp64 inputs). Per token and channel: forward two exponentials and a
// division, backward six and one; a gate adds one and one to each. `rookery bench ops` times it.
#include <optional>
#include <type_traits>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/wkv4.h"

namespace rwkv::ops {
namespace {

// Backward keeps the state at every 64th token and recomputes the tokens between: 64 states of one
// vector of channels are 6 KB, well inside the first-level cache.
constexpr int64_t kChunkLen = 64;

struct Sizes {
  int64_t seq_len;
  int64_t dim_att;
};

// (a, b, p) of one vector of channels.
template <typename Vector>
struct Carry {
  Vector a, b, p;
};

// The state before a document's first token.
template <typename Vector>
RWKV_INLINE Carry<Vector> nothing() {
  using Scalar = std::remove_reference_t<decltype(Vector{}[0])>;
  return {Vector{}, Vector{}, Vector{} + static_cast<Scalar>(kLogOfNothing)};
}

// Weights of two terms with exponents x and y, scaled by the larger: one exponential serves both.
template <typename Vector>
struct Weights {
  Vector x, y, max;
};
template <typename Vector>
RWKV_INLINE Weights<Vector> scaled_weights(Vector x, Vector y) {
  const Vector difference = x - y;
  const Vector smaller = exp_lanes(difference > 0 ? -difference : difference);
  const Vector one = Vector{} + 1;
  return {difference >= 0 ? one : smaller, difference >= 0 ? smaller : one, max_lanes(x, y)};
}

// A carry in memory that holds plain numbers: containers do not keep the alignment of vectors.
template <typename Vector, typename Scalar>
RWKV_INLINE void keep(const Carry<Vector>& carry, Scalar* memory) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Scalar);
  store_lanes(memory, carry.a);
  store_lanes(memory + kLanes, carry.b);
  store_lanes(memory + 2 * kLanes, carry.p);
}
template <typename Scalar>
RWKV_INLINE auto kept(const Scalar* memory) {
  using Vector = decltype(load_lanes(memory));
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(Scalar);
  return Carry<Vector>{
      load_lanes(memory), load_lanes(memory + kLanes), load_lanes(memory + 2 * kLanes)};
}

template <typename Vector>
RWKV_INLINE void advance(Carry<Vector>& carry, Vector w_log, Vector k, Vector v) {
  const Weights<Vector> weights = scaled_weights(carry.p + w_log, k);
  carry.a = weights.x * carry.a + weights.y * v;
  carry.b = weights.x * carry.b + weights.y;
  carry.p = weights.max;
}

RWKV_INLINE bool is_start(const bool* starts, int64_t t) {
  return starts != nullptr && starts[t];
}

// One batch row, `count` channels. Pointers are at the row's first token and channel.
template <typename Element, typename Scalar>
struct ForwardRow {
  const Scalar* w_log;
  const Scalar* u;
  const Element* k;
  const Element* v;
  const Element* r;    // null without gate
  const bool* starts;  // null without
  const Scalar* state_in;
  Element* y;
  Scalar* state_out;
};

template <typename Element, typename Scalar>
RWKV_INLINE void forward_body(const ForwardRow<Element, Scalar>& row, Sizes sizes, int64_t count) {
  using Vector = typename VectorOf<Element>::Vector;
  const int64_t stride = sizes.dim_att;
  const Vector w_log = load_lanes(row.w_log, count);
  const Vector u = load_lanes(row.u, count);
  Carry<Vector> carry{load_lanes(row.state_in, count),
                      load_lanes(row.state_in + stride, count),
                      load_lanes(row.state_in + 2 * stride, count)};
  for (int64_t t = 0; t < sizes.seq_len; ++t) {
    if (is_start(row.starts, t)) {
      carry = nothing<Vector>();
    }
    const Vector k = load_lanes(row.k + t * stride, count);
    const Vector v = load_lanes(row.v + t * stride, count);
    const Weights<Vector> weights = scaled_weights(carry.p, u + k);
    Vector y = (weights.x * carry.a + weights.y * v) / (weights.x * carry.b + weights.y);
    if (row.r != nullptr) {
      y *= sigmoid_lanes(load_lanes(row.r + t * stride, count));
    }
    store_lanes(row.y + t * stride, y, count);
    advance(carry, w_log, k, v);
  }
  store_lanes(row.state_out, carry.a, count);
  store_lanes(row.state_out + stride, carry.b, count);
  store_lanes(row.state_out + 2 * stride, carry.p, count);
}

template <typename Element, typename Scalar>
struct BackwardRow {
  const Scalar* w_log;
  const Scalar* u;
  const Element* k;
  const Element* v;
  const Element* r;    // null without gate
  const bool* starts;  // null without
  const Scalar* state_in;
  const Element* dy;
  const Scalar* dstate_out;  // null for zeros
  Scalar* dw_log;            // of this batch row alone
  Scalar* du;
  Element* dk;
  Element* dv;
  Element* dr;  // null without gate
  Scalar* dstate_in;
};

template <typename Element, typename Scalar>
RWKV_INLINE void backward_body(const BackwardRow<Element, Scalar>& row,
                               Sizes sizes,
                               int64_t count,
                               Scalar* chunk_starts) {
  constexpr int64_t kCarrySize = 3 * VectorOf<Element>::kLanes;
  using Vector = typename VectorOf<Element>::Vector;
  const int64_t stride = sizes.dim_att;
  const int64_t seq_len = sizes.seq_len;
  const Vector w_log = load_lanes(row.w_log, count);
  const Vector u = load_lanes(row.u, count);

  Carry<Vector> carry{load_lanes(row.state_in, count),
                      load_lanes(row.state_in + stride, count),
                      load_lanes(row.state_in + 2 * stride, count)};
  const Vector p_in = is_start(row.starts, 0) ? nothing<Vector>().p : carry.p;
  for (int64_t t = 0; t < seq_len; ++t) {
    if (is_start(row.starts, t)) {
      carry = nothing<Vector>();
    }
    if (t % kChunkLen == 0) {
      keep(carry, chunk_starts + t / kChunkLen * kCarrySize);
    }
    advance(
        carry, w_log, load_lanes(row.k + t * stride, count), load_lanes(row.v + t * stride, count));
  }

  // Adjoints al = alpha e^o and be = beta e^o; the gradient of the final state starts them.
  Vector alpha = Vector{};
  Vector beta = Vector{};
  if (row.dstate_out != nullptr) {
    alpha = load_lanes(row.dstate_out, count);
    beta = -load_lanes(row.dstate_out + stride, count);
  }
  Vector o = -carry.p;
  Vector dw_log = Vector{};
  Vector du = Vector{};
  Carry<Vector> before[kChunkLen];
  const int64_t num_chunks = (seq_len + kChunkLen - 1) / kChunkLen;
  for (int64_t chunk = num_chunks - 1; chunk >= 0; --chunk) {
    const int64_t begin = chunk * kChunkLen;
    const int64_t end = begin + kChunkLen < seq_len ? begin + kChunkLen : seq_len;
    carry = kept(chunk_starts + chunk * kCarrySize);
    for (int64_t t = begin; t < end; ++t) {
      if (is_start(row.starts, t)) {
        carry = nothing<Vector>();
      }
      before[t - begin] = carry;
      advance(carry,
              w_log,
              load_lanes(row.k + t * stride, count),
              load_lanes(row.v + t * stride, count));
    }
    for (int64_t t = end - 1; t >= begin; --t) {
      const Vector k = load_lanes(row.k + t * stride, count);
      const Vector v = load_lanes(row.v + t * stride, count);
      const Carry<Vector>& state = before[t - begin];
      const Weights<Vector> weights = scaled_weights(state.p, u + k);
      const Vector denominator = weights.x * state.b + weights.y;
      const Vector y = (weights.x * state.a + weights.y * v) / denominator;
      Vector dy = load_lanes(row.dy + t * stride, count);
      if (row.r != nullptr) {
        const Vector gate = sigmoid_lanes(load_lanes(row.r + t * stride, count));
        dy *= gate;
        store_lanes(row.dr + t * stride, dy * y * (1 - gate), count);
      }
      const Vector s = dy / denominator;
      const Vector bonus = weights.y * s;
      // k + o and w + p + o are at most 0: o is at most minus any later p, which is at least those.
      const Vector later = exp_lanes(k + o);
      const Vector through_bonus = bonus * (v - y);
      store_lanes(row.dv + t * stride, bonus + later * alpha, count);
      store_lanes(row.dk + t * stride, through_bonus + later * (alpha * v - beta), count);
      du += through_bonus;
      dw_log += exp_lanes(w_log + state.p + o) * (state.a * alpha - state.b * beta);
      const Weights<Vector> back = scaled_weights(o + w_log, -weights.max);
      alpha = back.x * alpha + back.y * s;
      beta = back.x * beta + back.y * s * y;
      o = back.max;
      if (is_start(row.starts, t)) {
        alpha = beta = Vector{};
        o = nothing<Vector>().p;
      }
    }
  }
  const Vector scale = exp_lanes(p_in + o);
  store_lanes(row.dstate_in, scale * alpha, count);
  store_lanes(row.dstate_in + stride, -scale * beta, count);
  store_lanes(row.dstate_in + 2 * stride, Vector{}, count);
  store_lanes(row.dw_log, dw_log, count);
  store_lanes(row.du, du, count);
}

#define RWKV_WKV4_KERNELS(Element, Scalar)                                                         \
  RWKV_CPU_CLONES void wkv4_forward_kernel(                                                        \
      const ForwardRow<Element, Scalar>& row, Sizes sizes, int64_t count) {                        \
    forward_body(row, sizes, count);                                                               \
  }                                                                                                \
  RWKV_CPU_CLONES void wkv4_backward_kernel(                                                       \
      const BackwardRow<Element, Scalar>& row, Sizes sizes, int64_t count, Scalar* chunk_starts) { \
    backward_body(row, sizes, count, chunk_starts);                                                \
  }
RWKV_WKV4_KERNELS(float, float)
RWKV_WKV4_KERNELS(Bf16, float)
RWKV_WKV4_KERNELS(double, double)
#undef RWKV_WKV4_KERNELS

// Calls `work(batch row, first channel, channels)` for every vector of channels, in parallel.
template <typename Element, typename Work>
void for_each_row(int64_t batch_size, int64_t dim_att, const Work& work) {
  constexpr int64_t kLanes = VectorOf<Element>::kLanes;
  const int64_t vectors = (dim_att + kLanes - 1) / kLanes;
  at::parallel_for(0, batch_size * vectors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t channel = i % vectors * kLanes;
      work(i / vectors, channel, std::min(kLanes, dim_att - channel));
    }
  });
}

template <typename Element>
void forward(const at::Tensor& w_log_A,
             const at::Tensor& k_BTA,
             const at::Tensor& v_BTA,
             const at::Tensor& u_A,
             const at::Tensor& state_B3A,
             const std::optional<at::Tensor>& r_BTA,
             const std::optional<at::Tensor>& starts_BT,
             const at::Tensor& y_BTA,
             const at::Tensor& state_out_B3A) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const Sizes sizes{k_BTA.size(1), k_BTA.size(2)};
  const auto* w_log = static_cast<const Scalar*>(w_log_A.const_data_ptr());
  const auto* u = static_cast<const Scalar*>(u_A.const_data_ptr());
  const auto* k = static_cast<const Element*>(k_BTA.const_data_ptr());
  const auto* v = static_cast<const Element*>(v_BTA.const_data_ptr());
  const auto* r = r_BTA ? static_cast<const Element*>(r_BTA->const_data_ptr()) : nullptr;
  const auto* starts = starts_BT ? starts_BT->const_data_ptr<bool>() : nullptr;
  const auto* state_in = static_cast<const Scalar*>(state_B3A.const_data_ptr());
  auto* y = static_cast<Element*>(y_BTA.mutable_data_ptr());
  auto* state_out = static_cast<Scalar*>(state_out_B3A.mutable_data_ptr());
  for_each_row<Element>(k_BTA.size(0), sizes.dim_att, [&](int64_t b, int64_t c, int64_t count) {
    const int64_t at = b * sizes.seq_len * sizes.dim_att + c;
    const int64_t state_at = b * 3 * sizes.dim_att + c;
    wkv4_forward_kernel(
        ForwardRow<Element, Scalar>{w_log + c,
                                    u + c,
                                    k + at,
                                    v + at,
                                    r == nullptr ? nullptr : r + at,
                                    starts == nullptr ? nullptr : starts + b * sizes.seq_len,
                                    state_in + state_at,
                                    y + at,
                                    state_out + state_at},
        sizes,
        count);
  });
}

struct Gradients {
  at::Tensor dw_log_BA, dk_BTA, dv_BTA, du_BA, dstate_B3A;
  at::Tensor dr_BTA;  // undefined without gate
};

template <typename Element>
void backward(const at::Tensor& w_log_A,
              const at::Tensor& k_BTA,
              const at::Tensor& v_BTA,
              const at::Tensor& u_A,
              const at::Tensor& state_B3A,
              const std::optional<at::Tensor>& r_BTA,
              const std::optional<at::Tensor>& starts_BT,
              const at::Tensor& dy_BTA,
              const std::optional<at::Tensor>& dstate_out_B3A,
              const Gradients& out) {
  using Scalar = typename VectorOf<Element>::Scalar;
  const Sizes sizes{k_BTA.size(1), k_BTA.size(2)};
  const auto* w_log = static_cast<const Scalar*>(w_log_A.const_data_ptr());
  const auto* u = static_cast<const Scalar*>(u_A.const_data_ptr());
  const auto* k = static_cast<const Element*>(k_BTA.const_data_ptr());
  const auto* v = static_cast<const Element*>(v_BTA.const_data_ptr());
  const auto* r = r_BTA ? static_cast<const Element*>(r_BTA->const_data_ptr()) : nullptr;
  auto* dr = r_BTA ? static_cast<Element*>(out.dr_BTA.mutable_data_ptr()) : nullptr;
  const auto* starts = starts_BT ? starts_BT->const_data_ptr<bool>() : nullptr;
  const auto* state_in = static_cast<const Scalar*>(state_B3A.const_data_ptr());
  const auto* dy = static_cast<const Element*>(dy_BTA.const_data_ptr());
  const auto* dstate_out =
      dstate_out_B3A ? static_cast<const Scalar*>(dstate_out_B3A->const_data_ptr()) : nullptr;
  auto* dw_log = static_cast<Scalar*>(out.dw_log_BA.mutable_data_ptr());
  auto* du = static_cast<Scalar*>(out.du_BA.mutable_data_ptr());
  auto* dk = static_cast<Element*>(out.dk_BTA.mutable_data_ptr());
  auto* dv = static_cast<Element*>(out.dv_BTA.mutable_data_ptr());
  auto* dstate_in = static_cast<Scalar*>(out.dstate_B3A.mutable_data_ptr());
  for_each_row<Element>(k_BTA.size(0), sizes.dim_att, [&](int64_t b, int64_t c, int64_t count) {
    static thread_local std::vector<Scalar> chunk_starts;
    const int64_t num_chunks = (sizes.seq_len + kChunkLen - 1) / kChunkLen;
    chunk_starts.resize(static_cast<size_t>(num_chunks * 3 * VectorOf<Element>::kLanes));
    const int64_t at = b * sizes.seq_len * sizes.dim_att + c;
    const int64_t state_at = b * 3 * sizes.dim_att + c;
    const int64_t sum_at = b * sizes.dim_att + c;
    wkv4_backward_kernel(
        BackwardRow<Element, Scalar>{w_log + c,
                                     u + c,
                                     k + at,
                                     v + at,
                                     r == nullptr ? nullptr : r + at,
                                     starts == nullptr ? nullptr : starts + b * sizes.seq_len,
                                     state_in + state_at,
                                     dy + at,
                                     dstate_out == nullptr ? nullptr : dstate_out + state_at,
                                     dw_log + sum_at,
                                     du + sum_at,
                                     dk + at,
                                     dv + at,
                                     dr == nullptr ? nullptr : dr + at,
                                     dstate_in + state_at},
        sizes,
        count,
        chunk_starts.data());
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> wkv4_cpu(
    const at::Tensor& w_log_A,
    const at::Tensor& k_BTA,
    const at::Tensor& v_BTA,
    const at::Tensor& u_A,
    const at::Tensor& state_B3A,
    const std::optional<at::Tensor>& r_BTA,
    const std::optional<at::Tensor>& starts_BT) {
  const at::Tensor y_BTA = at::empty_like(k_BTA);
  const at::Tensor state_out_B3A = at::empty_like(state_B3A);
  const auto kernel = k_BTA.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : k_BTA.scalar_type() == at::kFloat  ? &forward<float>
                                                           : &forward<double>;
  kernel(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA, starts_BT, y_BTA, state_out_B3A);
  // Backward finds the states within the sequence again, with one of its six exponentials.
  const at::Tensor no_carries = at::empty({0}, state_B3A.options());
  return {y_BTA, state_out_B3A, no_carries};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv4_backward_cpu(const at::Tensor& w_log_A,
                  const at::Tensor& k_BTA,
                  const at::Tensor& v_BTA,
                  const at::Tensor& u_A,
                  const at::Tensor& state_B3A,
                  const std::optional<at::Tensor>& r_BTA,
                  const std::optional<at::Tensor>& starts_BT,
                  const at::Tensor& /*carries*/,
                  const at::Tensor& dy_BTA,
                  const std::optional<at::Tensor>& dstate_out_B3A) {
  const at::Tensor dr_BTA = r_BTA ? at::empty_like(*r_BTA) : at::Tensor();
  if (k_BTA.size(1) == 0) {
    return {at::zeros_like(w_log_A),
            at::empty_like(k_BTA),
            at::empty_like(v_BTA),
            at::zeros_like(u_A),
            dstate_out_B3A ? dstate_out_B3A->clone() : at::zeros_like(state_B3A),
            dr_BTA};
  }
  const int64_t batch_size = k_BTA.size(0);
  const Gradients out{.dw_log_BA = at::empty({batch_size, k_BTA.size(2)}, w_log_A.options()),
                      .dk_BTA = at::empty_like(k_BTA),
                      .dv_BTA = at::empty_like(v_BTA),
                      .du_BA = at::empty({batch_size, k_BTA.size(2)}, u_A.options()),
                      .dstate_B3A = at::empty_like(state_B3A),
                      .dr_BTA = dr_BTA};
  const auto kernel = k_BTA.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : k_BTA.scalar_type() == at::kFloat  ? &backward<float>
                                                           : &backward<double>;
  kernel(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA, starts_BT, dy_BTA, dstate_out_B3A, out);
  return {sum_in_order(out.dw_log_BA),
          out.dk_BTA,
          out.dv_BTA,
          sum_in_order(out.du_BA),
          out.dstate_B3A,
          dr_BTA};
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("wkv4", &wkv4_cpu);
  library.impl("wkv4_backward", &wkv4_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
