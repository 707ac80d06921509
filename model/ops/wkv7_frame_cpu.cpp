// CPU kernels of wkv7_inputs and wkv7_output, which stand before and behind wkv7: one pass over
// memory each, a head of a token at a time, what backward needs of forward computed again. Threads
// take strips of 32 tokens; each strip leaves its part of the parameters' gradients in rows of its
// own. Floors in bytes an element of E bytes: wkv7_inputs 9 E forward and 14 E backward (in the
// first layer 5 E and 7 E), wkv7_output 6 E and 11 E.
#include <algorithm>
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/arguments.h"
#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/tensor_data.h"
#include "model/ops/wkv7_inputs.h"
#include "model/ops/wkv7_output.h"

namespace rwkv::ops {
namespace {

constexpr int64_t kStripLen = 32;
constexpr double kLeastNorm = 1e-12;

struct Sizes {
  int64_t num_tokens, n_embd, head_size;
  int64_t num_heads() const { return n_embd / head_size; }
  int64_t num_strips() const { return (num_tokens + kStripLen - 1) / kStripLen; }
};

// ---- wkv7_inputs --------------------------------------------------------------------------------

template <typename Element>
struct InputsForward {
  Sizes sizes;
  const Element *k, *a_raw, *v;
  const Element *v_raw, *v_first;  // null in the first layer
  const Element *k_k, *k_a;
  Element *k_out, *v_out, *a, *b;
};

template <typename Scalar>
RWKV_INLINE Scalar inverse_norm(Scalar sum_of_squares) {
  return 1 / std::max(std::sqrt(sum_of_squares), static_cast<Scalar>(kLeastNorm));
}

// The head whose first channel is `c`, of the token at `token`.
template <typename Vector, typename Element>
RWKV_INLINE void inputs_head(const InputsForward<Element>& x, int64_t token, int64_t c) {
  const int64_t N = x.sizes.head_size, at = token + c;
  Vector squares = {};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector p =
        load_lanes<Vector>(x.k + at + i, count) * load_lanes<Vector>(x.k_k + c + i, count);
    squares += p * p;
  });
  const auto inverse = inverse_norm(sum_of_lanes(squares));
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector k = load_lanes<Vector>(x.k + at + i, count);
    const Vector kk = k * load_lanes<Vector>(x.k_k + c + i, count) * inverse;
    const Vector alpha = sigmoid_lanes(load_lanes<Vector>(x.a_raw + at + i, count));
    store_lanes(
        x.k_out + at + i, k * (1 + (alpha - 1) * load_lanes<Vector>(x.k_a + c + i, count)), count);
    store_lanes(x.a + at + i, -kk, count);
    store_lanes(x.b + at + i, kk * alpha, count);
    if (x.v_raw != nullptr) {
      const Vector v = load_lanes<Vector>(x.v + at + i, count);
      const Vector q = sigmoid_lanes(load_lanes<Vector>(x.v_raw + at + i, count));
      store_lanes(
          x.v_out + at + i, v + (load_lanes<Vector>(x.v_first + at + i, count) - v) * q, count);
    }
  });
}

template <typename Element, typename Scalar>
struct InputsBackward {
  Sizes sizes;
  const Element *k, *a_raw;
  const Element *v, *v_raw, *v_first;  // null in the first layer
  const Element *k_k, *k_a;
  const Element *dk_out, *da, *db;
  const Element* dv_out;  // null in the first layer
  Element *dk, *da_raw;
  Element *dv, *dv_raw, *dv_first;  // null in the first layer
  Scalar* sums;                     // [strips, 2, C]: of k_k and k_a
};

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void inputs_backward_head(const InputsBackward<Element, Scalar>& x,
                                      Scalar* sums,
                                      int64_t token,
                                      int64_t c) {
  const int64_t N = x.sizes.head_size, at = token + c;
  Vector squares = {}, products = {};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector p =
        load_lanes<Vector>(x.k + at + i, count) * load_lanes<Vector>(x.k_k + c + i, count);
    const Vector alpha = sigmoid_lanes(load_lanes<Vector>(x.a_raw + at + i, count));
    const Vector dkk =
        alpha * load_lanes<Vector>(x.db + at + i, count) - load_lanes<Vector>(x.da + at + i, count);
    squares += p * p;
    products += p * dkk;
  });
  const Scalar sum_of_squares = sum_of_lanes(squares);
  const Scalar inverse = inverse_norm(sum_of_squares);
  // Of the projection on kk; none where the norm is cut off.
  const Scalar share = std::sqrt(sum_of_squares) > static_cast<Scalar>(kLeastNorm)
                           ? sum_of_lanes(products) * inverse
                           : Scalar{};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector k = load_lanes<Vector>(x.k + at + i, count);
    const Vector k_k = load_lanes<Vector>(x.k_k + c + i, count);
    const Vector k_a = load_lanes<Vector>(x.k_a + c + i, count);
    const Vector kk = k * k_k * inverse;
    const Vector alpha = sigmoid_lanes(load_lanes<Vector>(x.a_raw + at + i, count));
    const Vector dk_out = load_lanes<Vector>(x.dk_out + at + i, count);
    const Vector db = load_lanes<Vector>(x.db + at + i, count);
    const Vector dkk = alpha * db - load_lanes<Vector>(x.da + at + i, count);
    const Vector dp = (dkk - kk * share) * inverse;
    store_lanes(x.dk + at + i, dk_out * (1 + (alpha - 1) * k_a) + k_k * dp, count);
    store_lanes(x.da_raw + at + i, (kk * db + dk_out * k * k_a) * alpha * (1 - alpha), count);
    Scalar *const dk_k = sums + c + i, *const dk_a = sums + x.sizes.n_embd + c + i;
    store_lanes(dk_k, load_lanes<Vector>(dk_k, count) + k * dp, count);
    store_lanes(dk_a, load_lanes<Vector>(dk_a, count) + dk_out * k * (alpha - 1), count);
    if (x.v_raw != nullptr) {
      const Vector q = sigmoid_lanes(load_lanes<Vector>(x.v_raw + at + i, count));
      const Vector dv_out = load_lanes<Vector>(x.dv_out + at + i, count);
      const Vector difference =
          load_lanes<Vector>(x.v_first + at + i, count) - load_lanes<Vector>(x.v + at + i, count);
      store_lanes(x.dv + at + i, (1 - q) * dv_out, count);
      store_lanes(x.dv_first + at + i, q * dv_out, count);
      store_lanes(x.dv_raw + at + i, dv_out * difference * q * (1 - q), count);
    }
  });
}

// ---- wkv7_output --------------------------------------------------------------------------------

template <typename Element>
struct OutputForward {
  Sizes sizes;
  const Element *y, *r, *k, *v, *g;
  const Element *r_k, *weight, *bias;
  double eps;
  Element* out;
};

template <typename Scalar>
struct HeadNumbers {
  Scalar mean, rstd, bonus;
};

// Of a head's y, and of its r, k and r_k. The variance is that of differences from the mean: the
// squares of y less that of the mean would cancel.
template <typename Vector, typename Scalar, typename Arguments>
RWKV_INLINE HeadNumbers<Scalar> numbers_of_head(const Arguments& x, int64_t at, int64_t c) {
  const int64_t N = x.sizes.head_size;
  Vector sum = {}, products = {};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    sum += load_lanes<Vector>(x.y + at + i, count);
    products += load_lanes<Vector>(x.r + at + i, count) * load_lanes<Vector>(x.k + at + i, count) *
                load_lanes<Vector>(x.r_k + c + i, count);
  });
  const Scalar mean = sum_of_lanes(sum) / static_cast<Scalar>(N);
  Vector squares = {};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector centred = first_lanes(load_lanes<Vector>(x.y + at + i, count) - mean, count);
    squares += centred * centred;
  });
  const Scalar variance = sum_of_lanes(squares) / static_cast<Scalar>(N);
  return {mean, 1 / std::sqrt(variance + static_cast<Scalar>(x.eps)), sum_of_lanes(products)};
}

template <typename Vector, typename Element>
RWKV_INLINE void output_head(const OutputForward<Element>& x, int64_t token, int64_t c) {
  const int64_t at = token + c;
  const auto numbers = numbers_of_head<Vector, LaneOf<Vector>>(x, at, c);
  for_each_vector<Vector>(x.sizes.head_size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector normal = (load_lanes<Vector>(x.y + at + i, count) - numbers.mean) * numbers.rstd;
    const Vector z = normal * load_lanes<Vector>(x.weight + c + i, count) +
                     load_lanes<Vector>(x.bias + c + i, count) +
                     numbers.bonus * load_lanes<Vector>(x.v + at + i, count);
    store_lanes(x.out + at + i, z * load_lanes<Vector>(x.g + at + i, count), count);
  });
}

template <typename Element, typename Scalar>
struct OutputBackward {
  Sizes sizes;
  const Element *y, *r, *k, *v, *g;
  const Element *r_k, *weight, *bias;
  double eps;
  const Element* dout;
  Element *dy, *dr, *dk, *dv, *dg;
  Scalar* sums;  // [strips, 3, C]: of r_k, weight and bias
};

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void output_backward_head(const OutputBackward<Element, Scalar>& x,
                                      Scalar* sums,
                                      int64_t token,
                                      int64_t c) {
  const int64_t N = x.sizes.head_size, at = token + c;
  const HeadNumbers<Scalar> numbers = numbers_of_head<Vector, Scalar>(x, at, c);
  Vector sum_e = {}, sum_e_normal = {}, sum_dz_v = {};
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector normal = (load_lanes<Vector>(x.y + at + i, count) - numbers.mean) * numbers.rstd;
    const Vector dz =
        load_lanes<Vector>(x.dout + at + i, count) * load_lanes<Vector>(x.g + at + i, count);
    const Vector e = dz * load_lanes<Vector>(x.weight + c + i, count);
    sum_e += e;
    sum_e_normal += e * normal;
    sum_dz_v += dz * load_lanes<Vector>(x.v + at + i, count);
  });
  const Scalar avg_e = sum_of_lanes(sum_e) / static_cast<Scalar>(N);
  const Scalar avg_e_normal = sum_of_lanes(sum_e_normal) / static_cast<Scalar>(N);
  const Scalar ds = sum_of_lanes(sum_dz_v);
  for_each_vector<Vector>(N, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector normal = (load_lanes<Vector>(x.y + at + i, count) - numbers.mean) * numbers.rstd;
    const Vector dout = load_lanes<Vector>(x.dout + at + i, count);
    const Vector v = load_lanes<Vector>(x.v + at + i, count);
    const Vector weight = load_lanes<Vector>(x.weight + c + i, count);
    const Vector z =
        normal * weight + load_lanes<Vector>(x.bias + c + i, count) + numbers.bonus * v;
    const Vector dz = dout * load_lanes<Vector>(x.g + at + i, count);
    const Vector r = load_lanes<Vector>(x.r + at + i, count);
    const Vector k = load_lanes<Vector>(x.k + at + i, count);
    const Vector r_k = load_lanes<Vector>(x.r_k + c + i, count);
    store_lanes(x.dg + at + i, dout * z, count);
    store_lanes(x.dy + at + i, (dz * weight - avg_e - normal * avg_e_normal) * numbers.rstd, count);
    store_lanes(x.dr + at + i, ds * k * r_k, count);
    store_lanes(x.dk + at + i, ds * r * r_k, count);
    store_lanes(x.dv + at + i, numbers.bonus * dz, count);
    Scalar *const dr_k = sums + c + i, *const dweight = dr_k + x.sizes.n_embd,
                  *const dbias = dweight + x.sizes.n_embd;
    store_lanes(dr_k, load_lanes<Vector>(dr_k, count) + ds * r * k, count);
    store_lanes(dweight, load_lanes<Vector>(dweight, count) + dz * normal, count);
    store_lanes(dbias, load_lanes<Vector>(dbias, count) + dz, count);
  });
}

// ---- Tensors to pointers ------------------------------------------------------------------------

// Calls `body(a vector, strip, index of the token's first element, first channel of the head)`.
template <typename Scalar, typename Body>
void for_each_head(const Sizes& sizes, const Body& body) {
  at::parallel_for(0, sizes.num_strips(), 1, [&](int64_t begin, int64_t end) {
    with_vectors<Scalar>([&](auto vector) RWKV_INLINE_LAMBDA {
      for (int64_t strip = begin; strip < end; ++strip) {
        const int64_t last = std::min((strip + 1) * kStripLen, sizes.num_tokens);
        for (int64_t token = strip * kStripLen; token < last; ++token) {
          for (int64_t c = 0; c < sizes.n_embd; c += sizes.head_size) {
            body(vector, strip, token * sizes.n_embd, c);
          }
        }
      }
    });
  });
}

Sizes sizes_of(const at::Tensor& x_BTC, int64_t head_size) {
  return {
      .num_tokens = x_BTC.size(0) * x_BTC.size(1), .n_embd = x_BTC.size(2), .head_size = head_size};
}

// Sums of each strip, [strips, rows, C]: at least one strip, so that they can be added up.
at::Tensor empty_sums(const Sizes& sizes, int64_t rows, const at::Tensor& like) {
  return at::zeros({std::max<int64_t>(sizes.num_strips(), 1), rows, sizes.n_embd},
                   like.options().dtype(exact_type(like.scalar_type())).requires_grad(false));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> wkv7_inputs_cpu(
    const at::Tensor& k_BTC,
    const at::Tensor& a_raw_BTC,
    const at::Tensor& v_BTC,
    const std::optional<at::Tensor>& v_raw_BTC,
    const std::optional<at::Tensor>& v_first_BTC,
    const at::Tensor& k_k_C,
    const at::Tensor& k_a_C,
    int64_t head_size) {
  const at::Tensor k_out = at::empty_like(k_BTC), a = at::empty_like(k_BTC),
                   b = at::empty_like(k_BTC),
                   v_out = v_raw_BTC ? at::empty_like(v_BTC) : at::Tensor();
  with_element_of(k_BTC, [&]<typename Element>() {
    const InputsForward<Element> x{.sizes = sizes_of(k_BTC, head_size),
                                   .k = data_of<Element>(k_BTC),
                                   .a_raw = data_of<Element>(a_raw_BTC),
                                   .v = data_of<Element>(v_BTC),
                                   .v_raw = data_of<Element>(v_raw_BTC),
                                   .v_first = data_of<Element>(v_first_BTC),
                                   .k_k = data_of<Element>(k_k_C),
                                   .k_a = data_of<Element>(k_a_C),
                                   .k_out = mutable_data_of<Element>(k_out),
                                   .v_out = mutable_data_of<Element>(v_out),
                                   .a = mutable_data_of<Element>(a),
                                   .b = mutable_data_of<Element>(b)};
    for_each_head<ScalarOf<Element>>(
        x.sizes,
        [&]<typename Vector>(As<Vector>, int64_t, int64_t token, int64_t c)
            RWKV_INLINE_LAMBDA { inputs_head<Vector>(x, token, c); });
  });
  return {k_out, v_out, a, b};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv7_inputs_backward_cpu(const at::Tensor& k_BTC,
                         const at::Tensor& a_raw_BTC,
                         const std::optional<at::Tensor>& v_BTC,
                         const std::optional<at::Tensor>& v_raw_BTC,
                         const std::optional<at::Tensor>& v_first_BTC,
                         const at::Tensor& k_k_C,
                         const at::Tensor& k_a_C,
                         int64_t head_size,
                         const at::Tensor& dk_out_BTC,
                         const at::Tensor& da_BTC,
                         const at::Tensor& db_BTC,
                         const std::optional<at::Tensor>& dv_out_BTC) {
  const auto empty_if_gated = [&] { return v_raw_BTC ? at::empty_like(k_BTC) : at::Tensor(); };
  const at::Tensor dk = at::empty_like(k_BTC), da_raw = at::empty_like(k_BTC),
                   dv = empty_if_gated(), dv_raw = empty_if_gated(), dv_first = empty_if_gated();
  const Sizes sizes = sizes_of(k_BTC, head_size);
  const at::Tensor sums = empty_sums(sizes, 2, k_BTC);
  with_element_of(k_BTC, [&]<typename Element>() {
    using Scalar = ScalarOf<Element>;
    const InputsBackward<Element, Scalar> x{.sizes = sizes,
                                            .k = data_of<Element>(k_BTC),
                                            .a_raw = data_of<Element>(a_raw_BTC),
                                            .v = data_of<Element>(v_BTC),
                                            .v_raw = data_of<Element>(v_raw_BTC),
                                            .v_first = data_of<Element>(v_first_BTC),
                                            .k_k = data_of<Element>(k_k_C),
                                            .k_a = data_of<Element>(k_a_C),
                                            .dk_out = data_of<Element>(dk_out_BTC),
                                            .da = data_of<Element>(da_BTC),
                                            .db = data_of<Element>(db_BTC),
                                            .dv_out = data_of<Element>(dv_out_BTC),
                                            .dk = mutable_data_of<Element>(dk),
                                            .da_raw = mutable_data_of<Element>(da_raw),
                                            .dv = mutable_data_of<Element>(dv),
                                            .dv_raw = mutable_data_of<Element>(dv_raw),
                                            .dv_first = mutable_data_of<Element>(dv_first),
                                            .sums = mutable_data_of<Scalar>(sums)};
    for_each_head<Scalar>(x.sizes,
                          [&]<typename Vector>(As<Vector>, int64_t strip, int64_t token, int64_t c)
                              RWKV_INLINE_LAMBDA {
                                inputs_backward_head<Vector>(
                                    x, x.sums + strip * 2 * sizes.n_embd, token, c);
                              });
  });
  const at::Tensor sum = sum_in_order(sums).to(k_BTC.scalar_type());
  return {dk, da_raw, dv, dv_raw, dv_first, sum[0], sum[1]};
}

at::Tensor wkv7_output_cpu(const at::Tensor& y_BTC,
                           const at::Tensor& r_BTC,
                           const at::Tensor& k_BTC,
                           const at::Tensor& v_BTC,
                           const at::Tensor& g_BTC,
                           const at::Tensor& r_k_HN,
                           const at::Tensor& weight_C,
                           const at::Tensor& bias_C,
                           double eps) {
  const at::Tensor out = at::empty_like(y_BTC);
  with_element_of(y_BTC, [&]<typename Element>() {
    const OutputForward<Element> x{.sizes = sizes_of(y_BTC, r_k_HN.size(1)),
                                   .y = data_of<Element>(y_BTC),
                                   .r = data_of<Element>(r_BTC),
                                   .k = data_of<Element>(k_BTC),
                                   .v = data_of<Element>(v_BTC),
                                   .g = data_of<Element>(g_BTC),
                                   .r_k = data_of<Element>(r_k_HN),
                                   .weight = data_of<Element>(weight_C),
                                   .bias = data_of<Element>(bias_C),
                                   .eps = eps,
                                   .out = mutable_data_of<Element>(out)};
    for_each_head<ScalarOf<Element>>(
        x.sizes,
        [&]<typename Vector>(As<Vector>, int64_t, int64_t token, int64_t c)
            RWKV_INLINE_LAMBDA { output_head<Vector>(x, token, c); });
  });
  return out;
}

std::tuple<at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor,
           at::Tensor>
wkv7_output_backward_cpu(const at::Tensor& y_BTC,
                         const at::Tensor& r_BTC,
                         const at::Tensor& k_BTC,
                         const at::Tensor& v_BTC,
                         const at::Tensor& g_BTC,
                         const at::Tensor& r_k_HN,
                         const at::Tensor& weight_C,
                         const at::Tensor& bias_C,
                         double eps,
                         const at::Tensor& dout_BTC) {
  const at::Tensor dy = at::empty_like(y_BTC), dr = at::empty_like(y_BTC),
                   dk = at::empty_like(y_BTC), dv = at::empty_like(y_BTC),
                   dg = at::empty_like(y_BTC);
  const Sizes sizes = sizes_of(y_BTC, r_k_HN.size(1));
  const at::Tensor sums = empty_sums(sizes, 3, y_BTC);
  with_element_of(y_BTC, [&]<typename Element>() {
    using Scalar = ScalarOf<Element>;
    const OutputBackward<Element, Scalar> x{.sizes = sizes,
                                            .y = data_of<Element>(y_BTC),
                                            .r = data_of<Element>(r_BTC),
                                            .k = data_of<Element>(k_BTC),
                                            .v = data_of<Element>(v_BTC),
                                            .g = data_of<Element>(g_BTC),
                                            .r_k = data_of<Element>(r_k_HN),
                                            .weight = data_of<Element>(weight_C),
                                            .bias = data_of<Element>(bias_C),
                                            .eps = eps,
                                            .dout = data_of<Element>(dout_BTC),
                                            .dy = mutable_data_of<Element>(dy),
                                            .dr = mutable_data_of<Element>(dr),
                                            .dk = mutable_data_of<Element>(dk),
                                            .dv = mutable_data_of<Element>(dv),
                                            .dg = mutable_data_of<Element>(dg),
                                            .sums = mutable_data_of<Scalar>(sums)};
    for_each_head<Scalar>(x.sizes,
                          [&]<typename Vector>(As<Vector>, int64_t strip, int64_t token, int64_t c)
                              RWKV_INLINE_LAMBDA {
                                output_backward_head<Vector>(
                                    x, x.sums + strip * 3 * sizes.n_embd, token, c);
                              });
  });
  const at::Tensor sum = sum_in_order(sums).to(y_BTC.scalar_type());
  return {dy, dr, dk, dv, dg, sum[0].view_as(r_k_HN), sum[1], sum[2]};
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("wkv7_inputs", &wkv7_inputs_cpu);
  library.impl("wkv7_inputs_backward", &wkv7_inputs_backward_cpu);
  library.impl("wkv7_output", &wkv7_output_cpu);
  library.impl("wkv7_output_backward", &wkv7_output_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
