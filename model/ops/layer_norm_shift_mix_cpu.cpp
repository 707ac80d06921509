// CPU kernels of layer_norm_shift_mix. A thread takes strips of 32 tokens of one batch row and
// walks them: forward in time, keeping the row normalised last; backward against time, keeping what
// the token after sends back. A strip normalises one row more than it has, its predecessor's. Rows
// of scratch (five vectors of C floats, and as many sums) stay in the second-level cache; the bytes
// are those of the tensors, once: forward x, delta, s and J outputs, backward s, J + 1 gradients
// and ds.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_sums.h"
#include "model/ops/cpu_vector.h"
#include "model/ops/layer_norm_shift_mix.h"

namespace rwkv::ops {
namespace {

constexpr int64_t kStripLen = 32;

struct Sizes {
  int64_t batch_size, seq_len, n_embd, num_mixes;
  // Scratch rows start at multiples of eight numbers, and their last vector is whole.
  int64_t padded() const { return (n_embd + 7) / 8 * 8; }
  int64_t strips_per_row() const { return (seq_len + kStripLen - 1) / kStripLen; }
};

struct Strip {
  int64_t row, begin, end;  // batch row; tokens
};

template <typename Element, typename Scalar>
RWKV_INLINE void widen_row(const Element* from, Scalar* to, int64_t size) {
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(to + c, load_lanes(from + c, count));
  });
}

// ---- Forward ------------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct ForwardArguments {
  Sizes sizes;
  Scalar eps;
  const Element* x;
  const Element* delta;  // may be null
  const Element* weight;
  const Element* bias;
  const Element* carry;
  const Element* mix;
  Element* sum;  // null without delta
  Element* last;
  Scalar* statistics;
  Element* const* mixed;
};

template <typename Scalar>
struct Statistics {
  Scalar mean, rstd;
};

// Writes x + delta, rounded as it will be stored, as numbers to compute with.
template <typename Element, typename Scalar>
RWKV_INLINE void add_rows(
    const Element* x, const Element* delta, Element* sum, Scalar* to, int64_t size) {
  if (delta == nullptr) {
    widen_row(x, to, size);
    return;
  }
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Element rounded[VectorOf<Element>::kLanes];
    store_lanes(rounded, load_lanes(x + c, count) + load_lanes(delta + c, count));
    const auto s = load_lanes(rounded);
    if (sum != nullptr) {
      store_lanes(sum + c, s, count);
    }
    store_lanes(to + c, s);
  });
}

// Two passes over a row in the cache: a variance from squares alone cancels.
template <typename Element, typename Scalar>
RWKV_INLINE Statistics<Scalar> statistics_of(const Scalar* row, int64_t size, Scalar eps) {
  using Vector = typename VectorOf<Element>::Vector;
  Vector sum = Vector{};
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    sum += first_lanes(load_lanes(row + c), count);
  });
  const Scalar mean = sum_of_lanes(sum) / static_cast<Scalar>(size);
  Vector squares = Vector{};
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector centred = first_lanes(load_lanes(row + c) - mean, count);
    squares += centred * centred;
  });
  const Scalar variance = sum_of_lanes(squares) / static_cast<Scalar>(size);
  return {mean, 1 / std::sqrt(variance + eps)};
}

// The normalised row of token t: n. Its sum and statistics are stored if the token is the strip's.
template <typename Element, typename Scalar>
RWKV_INLINE void normalise_token(
    const ForwardArguments<Element, Scalar>& a, int64_t row, int64_t t, bool owned, Scalar* n) {
  const int64_t size = a.sizes.n_embd;
  const int64_t token = row * a.sizes.seq_len + t;
  const Element* delta = a.delta == nullptr ? nullptr : a.delta + token * size;
  Element* sum = a.sum == nullptr || !owned ? nullptr : a.sum + token * size;
  add_rows(a.x + token * size, delta, sum, n, size);
  const Statistics<Scalar> statistics = statistics_of<Element>(n, size, a.eps);
  if (owned) {
    a.statistics[2 * token] = statistics.mean;
    a.statistics[2 * token + 1] = statistics.rstd;
  }
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const auto xhat = (load_lanes(n + c) - statistics.mean) * statistics.rstd;
    store_lanes(n + c, xhat * load_lanes(a.weight + c, count) + load_lanes(a.bias + c, count));
  });
}

// `scratch` has two padded rows.
template <typename Element, typename Scalar>
RWKV_INLINE void forward_strip(const ForwardArguments<Element, Scalar>& a,
                               Strip strip,
                               Scalar* scratch) {
  const int64_t size = a.sizes.n_embd;
  Scalar* n = scratch;
  Scalar* previous = scratch + a.sizes.padded();
  if (strip.begin == 0) {
    widen_row(a.carry + strip.row * size, previous, size);
  } else {
    normalise_token(a, strip.row, strip.begin - 1, false, previous);
  }
  for (int64_t t = strip.begin; t < strip.end; ++t) {
    normalise_token(a, strip.row, t, true, n);
    for (int64_t j = 0; j < a.sizes.num_mixes; ++j) {
      Element* out = a.mixed[j] + (strip.row * a.sizes.seq_len + t) * size;
      const Element* mix = a.mix + j * size;
      for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
        const auto before = load_lanes(previous + c);
        const auto mu = load_lanes(mix + c, count);
        store_lanes(out + c, before + mu * (load_lanes(n + c) - before), count);
      });
    }
    std::swap(n, previous);
  }
  if (strip.end == a.sizes.seq_len) {
    for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      store_lanes(a.last + strip.row * size + c, load_lanes(previous + c), count);
    });
  }
}

// ---- Backward -----------------------------------------------------------------------------------

template <typename Element, typename Scalar>
struct BackwardArguments {
  Sizes sizes;
  const Element* sum;
  const Scalar* statistics;
  const Element* weight;
  const Element* bias;
  const Element* carry;
  const Element* mix;
  const Element* dsum;   // may be null
  const Element* dlast;  // may be null
  const Element* const* dmixed;
  Element* ds;
  Element* dcarry;
};

// Rows of scratch of a strip.
template <typename Scalar>
struct BackwardRows {
  Scalar* xhat;         // of this token
  Scalar* n;            //
  Scalar* xhat_before;  // of its predecessor
  Scalar* n_before;     //
  Scalar* later;        // sum_j (1 - mu_j) g_j of the token after
  Scalar* gn;           // gn weight of this token
  Scalar* sums;         // dweight, dbias, then dmu_j: rows of this strip's sums
};
constexpr int64_t kBackwardScratchRows = 6;

template <typename Element, typename Scalar>
RWKV_INLINE void restore_token(const BackwardArguments<Element, Scalar>& a,
                               int64_t row,
                               int64_t t,
                               Scalar* xhat_row,
                               Scalar* n_row) {
  const int64_t size = a.sizes.n_embd;
  const int64_t token = row * a.sizes.seq_len + t;
  const Scalar mean = a.statistics[2 * token];
  const Scalar rstd = a.statistics[2 * token + 1];
  const Element* sum = a.sum + token * size;
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const auto xhat = (load_lanes(sum + c, count) - mean) * rstd;
    store_lanes(xhat_row + c, xhat);
    store_lanes(n_row + c, xhat * load_lanes(a.weight + c, count) + load_lanes(a.bias + c, count));
  });
}

// later = sum_j (1 - mu_j) g_j of token t, which its predecessor receives.
template <typename Element, typename Scalar>
RWKV_INLINE void gather_later(const BackwardArguments<Element, Scalar>& a,
                              int64_t row,
                              int64_t t,
                              Scalar* later) {
  using Vector = typename VectorOf<Element>::Vector;
  const int64_t size = a.sizes.n_embd;
  const int64_t at = (row * a.sizes.seq_len + t) * size;
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Vector sum = Vector{};
    for (int64_t j = 0; j < a.sizes.num_mixes; ++j) {
      sum +=
          (1 - load_lanes(a.mix + j * size + c, count)) * load_lanes(a.dmixed[j] + at + c, count);
    }
    store_lanes(later + c, sum);
  });
}

// What follows the strip's last token sends back: the next strip's first token, or `last`.
template <typename Element, typename Scalar>
RWKV_INLINE void start_later(const BackwardArguments<Element, Scalar>& a,
                             Strip strip,
                             Scalar* later) {
  if (strip.end < a.sizes.seq_len) {
    gather_later(a, strip.row, strip.end, later);
  } else if (a.dlast != nullptr) {
    widen_row(a.dlast + strip.row * a.sizes.n_embd, later, a.sizes.n_embd);
  } else {
    std::fill(later, later + a.sizes.padded(), Scalar{0});
  }
}

template <typename Element, typename Scalar>
RWKV_INLINE void backward_token(const BackwardArguments<Element, Scalar>& a,
                                int64_t row,
                                int64_t t,
                                const BackwardRows<Scalar>& rows) {
  using Vector = typename VectorOf<Element>::Vector;
  const int64_t size = a.sizes.n_embd;
  const int64_t padded = a.sizes.padded();
  const int64_t token = row * a.sizes.seq_len + t;
  const int64_t at = token * size;
  Vector sum = Vector{};
  Vector sum_xhat = Vector{};
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector difference = load_lanes(rows.n + c) - load_lanes(rows.n_before + c);
    const Vector xhat = load_lanes(rows.xhat + c);
    Vector gn = load_lanes(rows.later + c);
    Vector later = Vector{};
    for (int64_t j = 0; j < a.sizes.num_mixes; ++j) {
      const Vector mu = load_lanes(a.mix + j * size + c, count);
      const Vector g = load_lanes(a.dmixed[j] + at + c, count);
      gn += mu * g;
      later += (1 - mu) * g;
      Scalar* dmu = rows.sums + (2 + j) * padded + c;
      store_lanes(dmu, load_lanes(dmu) + g * difference);
    }
    store_lanes(rows.later + c, later);
    Scalar* dweight = rows.sums + c;
    Scalar* dbias = rows.sums + padded + c;
    store_lanes(dweight, load_lanes(dweight) + gn * xhat);
    store_lanes(dbias, load_lanes(dbias) + gn);
    const Vector scaled = gn * load_lanes(a.weight + c, count);
    store_lanes(rows.gn + c, scaled);
    sum += scaled;
    sum_xhat += scaled * xhat;
  });
  const Scalar average = sum_of_lanes(sum) / static_cast<Scalar>(size);
  const Scalar average_xhat = sum_of_lanes(sum_xhat) / static_cast<Scalar>(size);
  const Scalar rstd = a.statistics[2 * token + 1];
  for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Vector ds =
        rstd * (load_lanes(rows.gn + c) - average - load_lanes(rows.xhat + c) * average_xhat);
    if (a.dsum != nullptr) {
      ds += load_lanes(a.dsum + at + c, count);
    }
    store_lanes(a.ds + at + c, ds, count);
  });
}

// `scratch` has kBackwardScratchRows padded rows, `sums` 2 + J rows of zeros.
template <typename Element, typename Scalar>
RWKV_INLINE void backward_strip(const BackwardArguments<Element, Scalar>& a,
                                Strip strip,
                                Scalar* scratch,
                                Scalar* sums) {
  const int64_t size = a.sizes.n_embd;
  const int64_t padded = a.sizes.padded();
  BackwardRows<Scalar> rows{scratch,
                            scratch + padded,
                            scratch + 2 * padded,
                            scratch + 3 * padded,
                            scratch + 4 * padded,
                            scratch + 5 * padded,
                            sums};
  start_later(a, strip, rows.later);
  restore_token(a, strip.row, strip.end - 1, rows.xhat, rows.n);
  for (int64_t t = strip.end - 1; t >= strip.begin; --t) {
    if (t > 0) {
      restore_token(a, strip.row, t - 1, rows.xhat_before, rows.n_before);
    } else {
      widen_row(a.carry + strip.row * size, rows.n_before, size);
    }
    backward_token(a, strip.row, t, rows);
    std::swap(rows.xhat, rows.xhat_before);
    std::swap(rows.n, rows.n_before);
  }
  if (strip.begin == 0) {
    for_each_vector<Element>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      store_lanes(a.dcarry + strip.row * size + c, load_lanes(rows.later + c), count);
    });
  }
}

#define RWKV_KERNELS(Element, Scalar)                                                            \
  RWKV_CPU_CLONES void forward_kernel(                                                           \
      const ForwardArguments<Element, Scalar>& a, Strip strip, Scalar* scratch) {                \
    forward_strip(a, strip, scratch);                                                            \
  }                                                                                              \
  RWKV_CPU_CLONES void backward_kernel(                                                          \
      const BackwardArguments<Element, Scalar>& a, Strip strip, Scalar* scratch, Scalar* sums) { \
    backward_strip(a, strip, scratch, sums);                                                     \
  }
RWKV_KERNELS(float, float)
RWKV_KERNELS(Bf16, float)
RWKV_KERNELS(double, double)
#undef RWKV_KERNELS

// ---- Tensors to pointers ------------------------------------------------------------------------

// Calls `work(strip, its number)`, in parallel.
template <typename Work>
void for_each_strip(const Sizes& sizes, const Work& work) {
  const int64_t per_row = sizes.strips_per_row();
  at::parallel_for(0, sizes.batch_size * per_row, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % per_row * kStripLen;
      work(Strip{i / per_row, first, std::min(first + kStripLen, sizes.seq_len)}, i);
    }
  });
}

template <typename Element>
const Element* data_of(const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}
template <typename Element>
Element* mutable_data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<Element*>(tensor.mutable_data_ptr()) : nullptr;
}
template <typename Element>
const Element* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? data_of<Element>(*tensor) : nullptr;
}

at::ScalarType arithmetic_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Sizes sizes_of(const at::Tensor& x_BTC, const at::Tensor& mix_JC) {
  return {x_BTC.size(0), x_BTC.size(1), x_BTC.size(2), mix_JC.size(0)};
}

struct ForwardTensors {
  at::Tensor sum_BTC, last_BC, statistics_BT2;
  std::vector<at::Tensor> mixed_J;
};

template <typename Element>
void forward(const at::Tensor& x_BTC,
             const std::optional<at::Tensor>& delta_BTC,
             const at::Tensor& weight_C,
             const at::Tensor& bias_C,
             const at::Tensor& carry_BC,
             const at::Tensor& mix_JC,
             double eps,
             const ForwardTensors& out) {
  using Scalar = typename VectorOf<Element>::Scalar;
  std::vector<Element*> mixed;
  for (const at::Tensor& tensor : out.mixed_J) {
    mixed.push_back(mutable_data_of<Element>(tensor));
  }
  const ForwardArguments<Element, Scalar> arguments{
      .sizes = sizes_of(x_BTC, mix_JC),
      .eps = static_cast<Scalar>(eps),
      .x = data_of<Element>(x_BTC),
      .delta = data_of<Element>(delta_BTC),
      .weight = data_of<Element>(weight_C),
      .bias = data_of<Element>(bias_C),
      .carry = data_of<Element>(carry_BC),
      .mix = data_of<Element>(mix_JC),
      .sum = mutable_data_of<Element>(out.sum_BTC),
      .last = mutable_data_of<Element>(out.last_BC),
      .statistics = mutable_data_of<Scalar>(out.statistics_BT2),
      .mixed = mixed.data()};
  for_each_strip(arguments.sizes, [&](Strip strip, int64_t) {
    static thread_local std::vector<Scalar> scratch;
    scratch.resize(static_cast<size_t>(2 * arguments.sizes.padded()));
    forward_kernel(arguments, strip, scratch.data());
  });
}

struct BackwardInputs {
  const at::Tensor& sum_BTC;
  const at::Tensor& statistics_BT2;
  const at::Tensor& weight_C;
  const at::Tensor& bias_C;
  const at::Tensor& carry_BC;
  const at::Tensor& mix_JC;
  const std::optional<at::Tensor>& dsum_BTC;
  const std::optional<at::Tensor>& dlast_BC;
  at::TensorList dmixed_J;
};

// Returns the strips' sums added up in order: [2 + J, C], rows dweight, dbias, dmu_j.
template <typename Element>
at::Tensor backward(const BackwardInputs& in,
                    const at::Tensor& ds_BTC,
                    const at::Tensor& dcarry_BC) {
  using Scalar = typename VectorOf<Element>::Scalar;
  std::vector<const Element*> dmixed;
  for (const at::Tensor& tensor : in.dmixed_J) {
    dmixed.push_back(data_of<Element>(tensor));
  }
  const BackwardArguments<Element, Scalar> arguments{
      .sizes = sizes_of(in.sum_BTC, in.mix_JC),
      .sum = data_of<Element>(in.sum_BTC),
      .statistics = data_of<Scalar>(in.statistics_BT2),
      .weight = data_of<Element>(in.weight_C),
      .bias = data_of<Element>(in.bias_C),
      .carry = data_of<Element>(in.carry_BC),
      .mix = data_of<Element>(in.mix_JC),
      .dsum = data_of<Element>(in.dsum_BTC),
      .dlast = data_of<Element>(in.dlast_BC),
      .dmixed = dmixed.data(),
      .ds = mutable_data_of<Element>(ds_BTC),
      .dcarry = mutable_data_of<Element>(dcarry_BC)};
  const Sizes& sizes = arguments.sizes;
  const int64_t rows = 2 + sizes.num_mixes;
  const at::Tensor sums =
      at::zeros({sizes.batch_size * sizes.strips_per_row(), rows, sizes.padded()},
                in.statistics_BT2.options());
  Scalar* const sums_data = mutable_data_of<Scalar>(sums);
  for_each_strip(sizes, [&](Strip strip, int64_t number) {
    static thread_local std::vector<Scalar> scratch;
    scratch.resize(static_cast<size_t>(kBackwardScratchRows * sizes.padded()));
    backward_kernel(arguments, strip, scratch.data(), sums_data + number * rows * sizes.padded());
  });
  const at::Tensor total = sum_in_order(sums);
  return total.slice(1, 0, sizes.n_embd).to(in.sum_BTC.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> layer_norm_shift_mix_cpu(
    const at::Tensor& x_BTC,
    const std::optional<at::Tensor>& delta_BTC,
    const at::Tensor& weight_C,
    const at::Tensor& bias_C,
    const at::Tensor& carry_BC,
    const at::Tensor& mix_JC,
    double eps) {
  ForwardTensors out{.sum_BTC = delta_BTC ? at::empty_like(x_BTC) : at::Tensor(),
                     .last_BC = at::empty_like(carry_BC),
                     .statistics_BT2 = at::empty({x_BTC.size(0), x_BTC.size(1), 2},
                                                 x_BTC.options().dtype(arithmetic_type(x_BTC))),
                     .mixed_J = {}};
  for (int64_t j = 0; j < mix_JC.size(0); ++j) {
    out.mixed_J.push_back(at::empty_like(x_BTC));
  }
  const auto kernel = x_BTC.scalar_type() == at::kBFloat16 ? &forward<Bf16>
                      : x_BTC.scalar_type() == at::kFloat  ? &forward<float>
                                                           : &forward<double>;
  kernel(x_BTC, delta_BTC, weight_C, bias_C, carry_BC, mix_JC, eps, out);
  return {out.sum_BTC, out.last_BC, out.statistics_BT2, std::move(out.mixed_J)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
layer_norm_shift_mix_backward_cpu(const at::Tensor& sum_BTC,
                                  const at::Tensor& statistics_BT2,
                                  const at::Tensor& weight_C,
                                  const at::Tensor& bias_C,
                                  const at::Tensor& carry_BC,
                                  const at::Tensor& mix_JC,
                                  const std::optional<at::Tensor>& dsum_BTC,
                                  const std::optional<at::Tensor>& dlast_BC,
                                  at::TensorList dmixed_J) {
  const at::Tensor ds_BTC = at::empty_like(sum_BTC);
  const at::Tensor dcarry_BC = at::empty_like(carry_BC);
  const auto kernel = sum_BTC.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : sum_BTC.scalar_type() == at::kFloat  ? &backward<float>
                                                             : &backward<double>;
  const at::Tensor sums = kernel(
      {sum_BTC, statistics_BT2, weight_C, bias_C, carry_BC, mix_JC, dsum_BTC, dlast_BC, dmixed_J},
      ds_BTC,
      dcarry_BC);
  return {ds_BTC, sums[0], sums[1], dcarry_BC, sums.slice(0, 2)};
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("layer_norm_shift_mix", &layer_norm_shift_mix_cpu);
  library.impl("layer_norm_shift_mix_backward", &layer_norm_shift_mix_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
