// CPU kernels of wkv4. A thread owns one batch row and a cache line of channels and walks time in
// sub-chunks of 16 tokens; all arithmetic is fp32 (fp64 for fp64 inputs).
//
// Within a sub-chunk all sums have the scale P = max(largest k, p before it), so that an element
// costs one exponential and one division forward, and as many backward, with a gate one more of
// each (forward they share the division). Behind it the sums go over to the running maximum that p
// is. That asks that no denominator underflows: P - smallest k + |u| <= 55. Where that fails, at a
// document's start and in a sequence's last, partial sub-chunk the way is token by token with a
// scale for each: five exponentials more. `rookery bench ops` times it.
#include <optional>
#include <type_traits>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/tensor_data.h"
#include "model/ops/wkv4.h"

namespace rwkv::ops {
namespace {

constexpr int64_t kSubLen = 16;
// Of the 87 that an exponent of fp32 may fall below zero; the rest is for values and sums.
constexpr float kRange = 55;

struct Sizes {
  int64_t seq_len;
  int64_t dim_att;
  int64_t num_subs() const { return (seq_len + kSubLen - 1) / kSubLen; }
};

template <typename Element>
constexpr int64_t kLineChannels = 64 / static_cast<int64_t>(sizeof(Element));

// ---- Sums with a scale --------------------------------------------------------------------------

// (a, b, p) of one vector of channels: a e^p and b e^p.
template <typename Vector>
struct Sums {
  Vector a, b, p;
};

template <typename Vector>
RWKV_INLINE Sums<Vector> no_sums() {
  return {Vector{}, Vector{}, Vector{} + static_cast<LaneOf<Vector>>(kLogOfNothing)};
}
template <typename Vector>
RWKV_INLINE Sums<Vector> load_sums(const LaneOf<Vector>* from, int64_t stride, int64_t count) {
  return {load_lanes<Vector>(from, count),
          load_lanes<Vector>(from + stride, count),
          load_lanes<Vector>(from + 2 * stride, count)};
}
template <typename Vector>
RWKV_INLINE void store_sums(LaneOf<Vector>* to, Sums<Vector> sums, int64_t stride, int64_t count) {
  store_lanes(to, sums.a, count);
  store_lanes(to + stride, sums.b, count);
  store_lanes(to + 2 * stride, sums.p, count);
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

template <typename Vector>
RWKV_INLINE Vector absolute(Vector x) {
  return x < 0 ? -x : x;
}

// The state after a token.
template <typename Vector>
RWKV_INLINE Sums<Vector> advanced(Sums<Vector> state, Vector w_log, Vector k, Vector v) {
  const Weights<Vector> weights = scaled_weights(state.p + w_log, k);
  return {weights.x * state.a + weights.y * v, weights.x * state.b + weights.y, weights.max};
}

// ---- A sub-chunk --------------------------------------------------------------------------------

// One vector of channels of a sub-chunk. Pointers are at its first token and channel.
template <typename Element>
struct Inputs {
  const Element* k;
  const Element* v;
  const Element* r;    // null without gate
  const bool* starts;  // null without
  int64_t len;
  int64_t stride;
  int64_t count;  // channels

  template <typename Vector>
  RWKV_INLINE Vector load(const Element* from, int64_t t) const {
    return load_lanes<Vector>(from + t * stride, count);
  }
  // Tokens lie so far apart that the processor does not see where the next will be.
  RWKV_INLINE void prefetch_at(int64_t t) const {
    prefetch(k + t * stride);
    prefetch(v + t * stride);
    if (r != nullptr) {
      prefetch(r + t * stride);
    }
  }
  RWKV_INLINE bool is_start(int64_t t) const { return starts != nullptr && starts[t]; }
  RWKV_INLINE bool has_start() const {
    for (int64_t t = 0; starts != nullptr && t < len; ++t) {
      if (starts[t]) {
        return true;
      }
    }
    return false;
  }
};

// Of the model's parameters.
template <typename Vector>
struct Parameters {
  Vector w_log, u;
  Vector decay, bonus;  // e^w, e^u; of use where |u| is within range
};
template <typename Vector>
RWKV_INLINE Parameters<Vector> load_parameters(const LaneOf<Vector>* w_log,
                                               const LaneOf<Vector>* u,
                                               int64_t count) {
  Parameters<Vector> result;
  result.w_log = load_lanes<Vector>(w_log, count);
  result.u = load_lanes<Vector>(u, count);
  result.decay = exp_lanes(result.w_log);
  const Vector most = Vector{} + kRange;
  result.bonus = exp_lanes(min_lanes(result.u, most));
  return result;
}

// A sub-chunk whose sums can share a scale.
template <typename Vector>
struct Shared {
  Vector scale;  // P
  Vector k[kSubLen];
  Sums<Vector> state;  // before it, with the scale P
  bool possible;
};
template <typename Vector, typename Element>
RWKV_INLINE void share_scale(const Inputs<Element>& in,
                             const Parameters<Vector>& parameters,
                             Sums<Vector> state,
                             Shared<Vector>& shared) {
  shared.possible = in.len == kSubLen && !in.has_start();
  if (!shared.possible) {
    return;
  }
  Vector most = in.template load<Vector>(in.k, 0);
  Vector least = most;
  shared.k[0] = most;
  for (int64_t t = 1; t < kSubLen; ++t) {
    shared.k[t] = in.template load<Vector>(in.k, t);
    most = max_lanes(shared.k[t], most);
    least = min_lanes(shared.k[t], least);
  }
  shared.scale = max_lanes(state.p, most);
  // A NaN anywhere fails, or passes through what follows.
  shared.possible = all_lanes(shared.scale - least + absolute(parameters.u) <= kRange);
  const Vector factor = exp_lanes(state.p - shared.scale);
  shared.state = {state.a * factor, state.b * factor, shared.scale};
}

// Returns the state after the sub-chunk.
template <typename Vector, typename Element>
RWKV_INLINE Sums<Vector> forward_sub(const Inputs<Element>& in,
                                     const Parameters<Vector>& parameters,
                                     Sums<Vector> state,
                                     Element* y) {
  const Vector one = Vector{} + 1;
  Shared<Vector> shared;
  share_scale(in, parameters, state, shared);
  if (shared.possible) {
    Vector a = shared.state.a, b = shared.state.b, p = state.p;
    for (int64_t t = 0; t < kSubLen; ++t) {
      in.prefetch_at(t + kSubLen);
      p = max_lanes(shared.k[t], p + parameters.w_log);
      const Vector f = exp_lanes(shared.k[t] - shared.scale);
      const Vector x = f * in.template load<Vector>(in.v, t);
      Vector numerator = a + parameters.bonus * x;
      Vector denominator = b + parameters.bonus * f;
      if (in.r != nullptr) {
        const Vector r = in.template load<Vector>(in.r, t);
        const Vector e = exp_lanes(r > 0 ? -r : r);
        numerator *= r > 0 ? one : e;
        denominator *= one + e;
      }
      store_lanes(y + t * in.stride, numerator / denominator, in.count);
      a = parameters.decay * a + x;
      b = parameters.decay * b + f;
    }
    // p is at least the last k, and so within range.
    const Vector factor = exp_lanes(shared.scale - p);
    return {a * factor, b * factor, p};
  }
  for (int64_t t = 0; t < in.len; ++t) {
    if (in.is_start(t)) {
      state = no_sums<Vector>();
    }
    const Vector k = in.template load<Vector>(in.k, t);
    const Vector v = in.template load<Vector>(in.v, t);
    const Weights<Vector> weights = scaled_weights(state.p, parameters.u + k);
    Vector out = (weights.x * state.a + weights.y * v) / (weights.x * state.b + weights.y);
    if (in.r != nullptr) {
      out *= sigmoid_lanes(in.template load<Vector>(in.r, t));
    }
    store_lanes(y + t * in.stride, out, in.count);
    state = advanced(state, parameters.w_log, k, v);
  }
  return state;
}

// Where backward writes; pointers as in Inputs.
template <typename Element>
struct Outputs {
  Element* dk;
  Element* dv;
  Element* dr;  // null without gate
};

// What goes back through time, and the sums over it, of one vector of channels.
template <typename Vector>
struct Adjoint {
  Sums<Vector> sums;  // al = a e^p, be = b e^p
  Vector dw_log;
  Vector du;
};

// dy of token t, through the gate if there is one, whose dr is stored.
template <typename Vector, typename Element>
RWKV_INLINE Vector through_gate(
    const Inputs<Element>& in, const Outputs<Element>& out, Vector y, Vector dy, int64_t t) {
  if (in.r == nullptr) {
    return dy;
  }
  const Vector gate = sigmoid_lanes(in.template load<Vector>(in.r, t));
  const Vector gated = dy * gate;
  store_lanes(out.dr + t * in.stride, gated * y * (1 - gate), in.count);
  return gated;
}

// Adjoints with a power of two moved from a and b, exactly, to p, where the larger of them is
// beyond 2^10 or below 2^-10: earlier sub-chunks may have a scale far from this one's.
template <typename Vector>
RWKV_INLINE Sums<Vector> rescaled(Sums<Vector> sums) {
  using Mask = MaskOf<Vector>;
  using Lane = LaneOf<Mask>;
  constexpr bool kIsDouble = std::is_same_v<LaneOf<Vector>, double>;
  constexpr Lane kMantissa = kIsDouble ? 52 : 23;
  constexpr Lane kBias = kIsDouble ? 1023 : 127;
  const Vector size = max_lanes(absolute(sums.a), absolute(sums.b));
  Mask bits;
  std::memcpy(&bits, &size, sizeof bits);
  Mask exponent = ((bits >> kMantissa) & (2 * kBias + 1)) - kBias;
  // Zero stays where it is; of inf and NaN nothing can be saved.
  exponent = (exponent == -kBias) | (exponent > kBias) | ((exponent < 10) & (exponent >= -10))
                 ? Mask{}
                 : exponent;
  const Mask power_bits = (kBias - exponent) << kMantissa;
  Vector power;
  std::memcpy(&power, &power_bits, sizeof power);
  constexpr auto kLn2 = static_cast<LaneOf<Vector>>(0.693147180559945309417);
  return {
      sums.a * power, sums.b * power, sums.p + __builtin_convertvector(exponent, Vector) * kLn2};
}

template <typename Vector, typename Element>
RWKV_INLINE void backward_shared(const Inputs<Element>& in,
                                 const Outputs<Element>& out,
                                 const Parameters<Vector>& parameters,
                                 Shared<Vector>& shared,
                                 const Element* dy,
                                 Adjoint<Vector>& adjoint) {
  Vector a[kSubLen], b[kSubLen];  // before each token
  Vector* const f = shared.k;
  a[0] = shared.state.a;
  b[0] = shared.state.b;
  for (int64_t t = 0; t < kSubLen; ++t) {
    f[t] = exp_lanes(shared.k[t] - shared.scale);
    if (t + 1 < kSubLen) {
      a[t + 1] = parameters.decay * a[t] + f[t] * in.template load<Vector>(in.v, t);
      b[t + 1] = parameters.decay * b[t] + f[t];
    }
  }
  const Vector factor = exp_lanes(adjoint.sums.p + shared.scale);
  Vector al = adjoint.sums.a * factor, be = adjoint.sums.b * factor;
  Vector dw = Vector{};
  for (int64_t t = kSubLen - 1; t >= 0; --t) {
    in.prefetch_at(t - kSubLen);
    prefetch(dy + (t - kSubLen) * in.stride);
    const Vector v = in.template load<Vector>(in.v, t);
    const Vector with_bonus = parameters.bonus * f[t];
    const Vector inverse = 1 / (b[t] + with_bonus);
    const Vector y = (a[t] + with_bonus * v) * inverse;
    const Vector s =
        through_gate(in, out, y, load_lanes<Vector>(dy + t * in.stride, in.count), t) * inverse;
    const Vector bonus = parameters.bonus * s;
    const Vector dv = f[t] * (al + bonus);
    store_lanes(out.dv + t * in.stride, dv, in.count);
    store_lanes(out.dk + t * in.stride, f[t] * (al * v - be + bonus * (v - y)), in.count);
    adjoint.du += with_bonus * s * (v - y);
    dw += a[t] * al - b[t] * be;
    al = parameters.decay * al + s;
    be = parameters.decay * be + s * y;
  }
  adjoint.dw_log += parameters.decay * dw;
  adjoint.sums = rescaled(Sums<Vector>{al, be, -shared.scale});
}

template <typename Vector, typename Element>
RWKV_INLINE void backward_token_by_token(const Inputs<Element>& in,
                                         const Outputs<Element>& out,
                                         const Parameters<Vector>& parameters,
                                         Sums<Vector> state,
                                         const Element* dy,
                                         Adjoint<Vector>& adjoint) {
  Sums<Vector> before[kSubLen];
  for (int64_t t = 0; t < in.len; ++t) {
    before[t] = in.is_start(t) ? no_sums<Vector>() : state;
    state = advanced(before[t],
                     parameters.w_log,
                     in.template load<Vector>(in.k, t),
                     in.template load<Vector>(in.v, t));
  }
  Sums<Vector> back = adjoint.sums;
  for (int64_t t = in.len - 1; t >= 0; --t) {
    const Vector k = in.template load<Vector>(in.k, t);
    const Vector v = in.template load<Vector>(in.v, t);
    const Weights<Vector> weights = scaled_weights(before[t].p, parameters.u + k);
    const Vector denominator = weights.x * before[t].b + weights.y;
    const Vector y = (weights.x * before[t].a + weights.y * v) / denominator;
    const Vector s =
        through_gate(in, out, y, load_lanes<Vector>(dy + t * in.stride, in.count), t) / denominator;
    const Vector bonus = weights.y * s;
    // k + p and w + p + p of the state are at most about 0: what came later has a denominator that
    // holds them.
    const Vector later = exp_lanes(k + back.p);
    const Vector through_bonus = bonus * (v - y);
    store_lanes(out.dv + t * in.stride, bonus + later * back.a, in.count);
    store_lanes(out.dk + t * in.stride, through_bonus + later * (back.a * v - back.b), in.count);
    adjoint.du += through_bonus;
    adjoint.dw_log += exp_lanes(parameters.w_log + before[t].p + back.p) *
                      (before[t].a * back.a - before[t].b * back.b);
    const Weights<Vector> sum = scaled_weights(back.p + parameters.w_log, -weights.max);
    back = {sum.x * back.a + sum.y * s, sum.x * back.b + sum.y * s * y, sum.max};
    if (in.is_start(t)) {
      back = no_sums<Vector>();
    }
  }
  adjoint.sums = back;
}

// ---- A line of channels -------------------------------------------------------------------------

// One batch row; pointers are at the row's first token and the line's first channel.
template <typename Element>
struct Line {
  Sizes sizes;
  int64_t channels;
  const ScalarOf<Element>* w_log;
  const ScalarOf<Element>* u;
  const Element* k;
  const Element* v;
  const Element* r;            // null without gate
  const bool* starts;          // null without
  ScalarOf<Element>* carries;  // states before each sub-chunk and after the last

  RWKV_INLINE Inputs<Element> inputs(int64_t sub, int64_t channel, int64_t lanes) const {
    const int64_t begin = sub * kSubLen, rest = sizes.seq_len - begin;
    const int64_t at = begin * sizes.dim_att + channel;
    return {.k = k + at,
            .v = v + at,
            .r = r == nullptr ? nullptr : r + at,
            .starts = starts == nullptr ? nullptr : starts + begin,
            .len = rest < kSubLen ? rest : kSubLen,
            .stride = sizes.dim_att,
            .count = channels - channel < lanes ? channels - channel : lanes};
  }
  RWKV_INLINE ScalarOf<Element>* carry(int64_t sub, int64_t channel) const {
    return carries + sub * 3 * sizes.dim_att + channel;
  }
};

// Calls `work(inputs, channel)` with the inputs of a sub-chunk, whose count is a constant where
// the line is whole.
template <typename Vector, typename Element, typename Work>
RWKV_INLINE void for_each_vector_of(const Line<Element>& line, int64_t sub, const Work& work) {
  for_each_vector<Vector>(line.channels, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Inputs<Element> in = line.inputs(sub, c, kLanes<Vector>);
    in.count = count;
    work(in, c);
  });
}

template <typename Vector, typename Element>
constexpr int64_t kLineVectors = kLineChannels<Element> / kLanes<Vector>;

template <typename Vector, typename Element>
RWKV_INLINE void load_parameters_of(
    const Line<Element>& line, Parameters<Vector> (&parameters)[kLineVectors<Vector, Element>]) {
  for_each_vector<Vector>(line.channels, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    parameters[c / kLanes<Vector>] = load_parameters<Vector>(line.w_log + c, line.u + c, count);
  });
}

template <typename Vector, typename Element>
RWKV_INLINE void forward_line(const Line<Element>& line, Element* y) {
  const int64_t stride = line.sizes.dim_att;
  Parameters<Vector> parameters[kLineVectors<Vector, Element>];
  load_parameters_of(line, parameters);
  for (int64_t sub = 0; sub < line.sizes.num_subs(); ++sub) {
    for_each_vector_of<Vector>(
        line, sub, [&](const Inputs<Element>& in, int64_t c) RWKV_INLINE_LAMBDA {
          const auto state = load_sums<Vector>(line.carry(sub, c), stride, in.count);
          store_sums(line.carry(sub + 1, c),
                     forward_sub(
                         in, parameters[c / kLanes<Vector>], state, y + sub * kSubLen * stride + c),
                     stride,
                     in.count);
        });
  }
}

template <typename Element>
struct LineGradients {
  const Element* dy;
  const ScalarOf<Element>* dstate_out;  // null for zeros
  Element* dk;
  Element* dv;
  Element* dr;                // null without gate
  ScalarOf<Element>* dw_log;  // of this batch row alone
  ScalarOf<Element>* du;
  ScalarOf<Element>* dstate_in;
};

template <typename Vector, typename Element>
RWKV_INLINE void backward_line(const Line<Element>& line, const LineGradients<Element>& gradients) {
  const int64_t stride = line.sizes.dim_att;
  const int64_t num_subs = line.sizes.num_subs();
  Parameters<Vector> all_parameters[kLineVectors<Vector, Element>];
  load_parameters_of(line, all_parameters);
  Adjoint<Vector> adjoints[kLineVectors<Vector, Element>];
  // The gradient of the final state is of a and b with the scale of that state.
  for_each_vector<Vector>(line.channels, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Sums<Vector> sums = no_sums<Vector>();
    if (gradients.dstate_out != nullptr) {
      sums = load_sums<Vector>(gradients.dstate_out + c, stride, count);
      const Vector p = load_lanes<Vector>(line.carry(num_subs, c) + 2 * stride, count);
      sums = {sums.a, -sums.b, -p};
    }
    adjoints[c / kLanes<Vector>] = {sums, Vector{}, Vector{}};
  });
  for (int64_t sub = num_subs - 1; sub >= 0; --sub) {
    for_each_vector_of<Vector>(
        line, sub, [&](const Inputs<Element>& in, int64_t c) RWKV_INLINE_LAMBDA {
          const int64_t at = sub * kSubLen * stride + c;
          const Outputs<Element> out{.dk = gradients.dk + at,
                                     .dv = gradients.dv + at,
                                     .dr = in.r == nullptr ? nullptr : gradients.dr + at};
          const auto state = load_sums<Vector>(line.carry(sub, c), stride, in.count);
          const Parameters<Vector>& parameters = all_parameters[c / kLanes<Vector>];
          Adjoint<Vector>& adjoint = adjoints[c / kLanes<Vector>];
          Shared<Vector> shared;
          share_scale(in, parameters, state, shared);
          if (shared.possible &&
              all_lanes(adjoint.sums.p + shared.scale <= LaneOf<Vector>{kRange})) {
            backward_shared(in, out, parameters, shared, gradients.dy + at, adjoint);
          } else {
            backward_token_by_token(in, out, parameters, state, gradients.dy + at, adjoint);
          }
        });
  }
  for_each_vector<Vector>(line.channels, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Adjoint<Vector>& adjoint = adjoints[c / kLanes<Vector>];
    const bool starts_anew = line.starts != nullptr && line.starts[0];
    const Vector p = load_lanes<Vector>(line.carry(0, c) + 2 * stride, count);
    const Vector scale = starts_anew ? Vector{} : exp_lanes(p + adjoint.sums.p);
    store_sums(gradients.dstate_in + c,
               Sums<Vector>{scale * adjoint.sums.a, -scale * adjoint.sums.b, Vector{}},
               stride,
               count);
    store_lanes(gradients.dw_log + c, adjoint.dw_log, count);
    store_lanes(gradients.du + c, adjoint.du, count);
  });
}

// ---- Tensors to pointers ------------------------------------------------------------------------

struct InputTensors {
  const at::Tensor& w_log_A;
  const at::Tensor& k_BTA;
  const at::Tensor& v_BTA;
  const at::Tensor& u_A;
  const std::optional<at::Tensor>& r_BTA;
  const std::optional<at::Tensor>& starts_BT;
  const at::Tensor& carries_BN3A;  // N is the number of sub-chunks and 1
};

// Calls `work(line, offset of its first token, offset of its states)` for every batch row and line
// of channels, in parallel. The offset of a row's sums, [B, A], is a third of its states'.
template <typename Element, typename Work>
void for_each_line(const InputTensors& in, const Work& work) {
  const int64_t dim_att = in.k_BTA.size(2);
  const Sizes sizes{in.k_BTA.size(1), dim_att};
  const int64_t lines = (dim_att + kLineChannels<Element> - 1) / kLineChannels<Element>;
  const auto* w_log = data_of<ScalarOf<Element>>(in.w_log_A);
  const auto* u = data_of<ScalarOf<Element>>(in.u_A);
  const auto* k = data_of<Element>(in.k_BTA);
  const auto* v = data_of<Element>(in.v_BTA);
  const auto* r = in.r_BTA ? data_of<Element>(*in.r_BTA) : nullptr;
  const auto* starts = in.starts_BT ? in.starts_BT->const_data_ptr<bool>() : nullptr;
  auto* carries = mutable_data_of<ScalarOf<Element>>(in.carries_BN3A);
  at::parallel_for(0, in.k_BTA.size(0) * lines, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / lines, c = i % lines * kLineChannels<Element>;
      const int64_t at = row * sizes.seq_len * dim_att + c;
      work(Line<Element>{.sizes = sizes,
                         .channels = std::min(kLineChannels<Element>, dim_att - c),
                         .w_log = w_log + c,
                         .u = u + c,
                         .k = k + at,
                         .v = v + at,
                         .r = r == nullptr ? nullptr : r + at,
                         .starts = starts == nullptr ? nullptr : starts + row * sizes.seq_len,
                         .carries = carries + row * (sizes.num_subs() + 1) * 3 * dim_att + c},
           row,
           c);
    }
  });
}

template <typename Element>
void forward(const InputTensors& in, const at::Tensor& y_BTA) {
  const int64_t seq_len = in.k_BTA.size(1), dim_att = in.k_BTA.size(2);
  auto* y = mutable_data_of<Element>(y_BTA);
  for_each_line<Element>(in, [&](const Line<Element>& line, int64_t row, int64_t c) {
    with_vectors<ScalarOf<Element>>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      forward_line<Vector>(line, y + row * seq_len * dim_att + c);
    });
  });
}

struct Gradients {
  at::Tensor dw_log_BA, dk_BTA, dv_BTA, du_BA, dstate_B3A;
  at::Tensor dr_BTA;  // undefined without gate
};

template <typename Element>
void backward(const InputTensors& in,
              const at::Tensor& dy_BTA,
              const std::optional<at::Tensor>& dstate_out_B3A,
              const Gradients& out) {
  using Scalar = ScalarOf<Element>;
  const int64_t seq_len = in.k_BTA.size(1), dim_att = in.k_BTA.size(2);
  const auto* dy = data_of<Element>(dy_BTA);
  const auto* dstate_out = dstate_out_B3A ? data_of<Scalar>(*dstate_out_B3A) : nullptr;
  auto* dk = mutable_data_of<Element>(out.dk_BTA);
  auto* dv = mutable_data_of<Element>(out.dv_BTA);
  auto* dr = out.dr_BTA.defined() ? mutable_data_of<Element>(out.dr_BTA) : nullptr;
  auto* dw_log = mutable_data_of<Scalar>(out.dw_log_BA);
  auto* du = mutable_data_of<Scalar>(out.du_BA);
  auto* dstate_in = mutable_data_of<Scalar>(out.dstate_B3A);
  for_each_line<Element>(in, [&](const Line<Element>& line, int64_t row, int64_t c) {
    const int64_t at = row * seq_len * dim_att + c;
    const int64_t state_at = row * 3 * dim_att + c;
    const int64_t sum_at = row * dim_att + c;
    const LineGradients<Element> gradients{
        .dy = dy + at,
        .dstate_out = dstate_out == nullptr ? nullptr : dstate_out + state_at,
        .dk = dk + at,
        .dv = dv + at,
        .dr = dr == nullptr ? nullptr : dr + at,
        .dw_log = dw_log + sum_at,
        .du = du + sum_at,
        .dstate_in = dstate_in + state_at};
    with_vectors<Scalar>([&]<typename Vector>(As<Vector>)
                             RWKV_INLINE_LAMBDA { backward_line<Vector>(line, gradients); });
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
  const int64_t num_subs = Sizes{k_BTA.size(1), k_BTA.size(2)}.num_subs();
  const at::Tensor carries_BN3A = at::empty({k_BTA.size(0), num_subs + 1, 3, k_BTA.size(2)},
                                            state_B3A.options().requires_grad(false));
  carries_BN3A.select(1, 0).copy_(state_B3A);
  const auto kernel = k_BTA.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : k_BTA.scalar_type() == at::kFloat  ? &forward<float>
                                                           : &forward<double>;
  kernel({w_log_A, k_BTA, v_BTA, u_A, r_BTA, starts_BT, carries_BN3A}, y_BTA);
  return {y_BTA, carries_BN3A.select(1, num_subs).clone(), carries_BN3A};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
wkv4_backward_cpu(const at::Tensor& w_log_A,
                  const at::Tensor& k_BTA,
                  const at::Tensor& v_BTA,
                  const at::Tensor& u_A,
                  const at::Tensor& state_B3A,
                  const std::optional<at::Tensor>& r_BTA,
                  const std::optional<at::Tensor>& starts_BT,
                  const at::Tensor& carries_BN3A,
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
  kernel({w_log_A, k_BTA, v_BTA, u_A, r_BTA, starts_BT, carries_BN3A}, dy_BTA, dstate_out_B3A, out);
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
