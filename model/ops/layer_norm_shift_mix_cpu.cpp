// CPU kernels of layer_norm_shift_mix. A thread takes strips of 32 tokens of one batch row and
// walks them: forward in time, keeping the row normalised last; backward against time, four tokens
// at once, keeping what the token after sends back. A strip normalises one row more than it has,
// its predecessor's. Rows of scratch (two forward; five and the sums backward, of C floats) stay in
// the caches; the bytes are those of the tensors, once: forward x, delta, s and J outputs, backward
// s, J + 1 gradients and ds.
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
#include "model/ops/tensor_data.h"

namespace rwkv::ops {
namespace {

constexpr int64_t kStripLen = 32;
// Tokens that backward takes at once: their sums over tokens are in memory once for all of them.
constexpr int64_t kAtOnce = 4;

struct Sizes {
  int64_t batch_size, seq_len, n_embd, num_mixes;
  // Scratch rows are whole vectors.
  int64_t padded() const { return (n_embd + 15) / 16 * 16; }
  int64_t strips_per_row() const { return (seq_len + kStripLen - 1) / kStripLen; }
};

struct Strip {
  int64_t row, begin, end;  // batch row; tokens
};

template <typename Vector, typename Element>
RWKV_INLINE void widen_row(const Element* from, LaneOf<Vector>* to, int64_t size) {
  for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    store_lanes(to + c, load_lanes<Vector>(from + c, count));
  });
}

template <typename Vector>
RWKV_INLINE LaneOf<Vector> sum_of_turns(const Vector (&sums)[kTurns]) {
  return sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
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

// s = x + delta, rounded as it will be stored, to `to` and, unless null, to `sum`. Returns the
// row's statistics. Two passes over a row in the cache: a variance from squares alone cancels.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE Statistics<Scalar> add_rows(
    const Element* x, const Element* delta, Element* sum, Scalar* to, int64_t size, Scalar eps) {
  Vector sums[kTurns] = {};
  for_each_vector_in_turns<Vector>(
      size, [&](int64_t c, int64_t count, auto turn) RWKV_INLINE_LAMBDA {
        Vector s = load_lanes<Vector>(x + c, count);
        if (delta != nullptr) {
          Element rounded[kLanes<Vector>];
          store_lanes(rounded, s + load_lanes<Vector>(delta + c, count));
          s = load_lanes<Vector>(rounded);
          if (sum != nullptr) {
            std::memcpy(sum + c, rounded, static_cast<size_t>(count) * sizeof(Element));
          }
        }
        store_lanes(to + c, s);
        sums[turn] += first_lanes(s, count);
      });
  const Scalar mean = sum_of_turns(sums) / static_cast<Scalar>(size);
  Vector squares[kTurns] = {};
  for_each_vector_in_turns<Vector>(
      size, [&](int64_t c, int64_t count, auto turn) RWKV_INLINE_LAMBDA {
        const Vector centred = first_lanes(load_lanes<Vector>(to + c) - mean, count);
        squares[turn] += centred * centred;
      });
  const Scalar variance = sum_of_turns(squares) / static_cast<Scalar>(size);
  return {mean, 1 / std::sqrt(variance + eps)};
}

// s of token t to `to`; sum and statistics are stored if the token is the strip's own.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE Statistics<Scalar> start_token(const ForwardArguments<Element, Scalar>& a,
                                           int64_t token,
                                           bool owned,
                                           Scalar* to) {
  const int64_t size = a.sizes.n_embd;
  const auto statistics =
      add_rows<Vector>(a.x + token * size,
                       a.delta == nullptr ? nullptr : a.delta + token * size,
                       a.sum == nullptr || !owned ? nullptr : a.sum + token * size,
                       to,
                       size,
                       a.eps);
  if (owned) {
    a.statistics[2 * token] = statistics.mean;
    a.statistics[2 * token + 1] = statistics.rstd;
  }
  return statistics;
}

template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE Vector normalised(Vector s,
                              Statistics<Scalar> statistics,
                              const Element* weight,
                              const Element* bias,
                              int64_t count) {
  return (s - statistics.mean) * statistics.rstd * load_lanes<Vector>(weight, count) +
         load_lanes<Vector>(bias, count);
}

// out[j] = n mu_j + previous (1 - mu_j) for the mixes from `first` on. `n` comes as s and is
// normalised on the way if those mixes are the first.
template <int kMixes, typename Vector, typename Element, typename Scalar>
RWKV_INLINE void mix_row(const ForwardArguments<Element, Scalar>& a,
                         int64_t token,
                         int64_t first,
                         Statistics<Scalar> statistics,
                         const Scalar* previous,
                         Scalar* n) {
  const int64_t size = a.sizes.n_embd;
  const Element *weight = a.weight, *bias = a.bias, *mix = a.mix + first * size;
  Element* out[kMixes];
  for (int j = 0; j < kMixes; ++j) {
    out[j] = a.mixed[first + j] + token * size;
  }
  const bool normalise = first == 0;
  for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Vector now = load_lanes<Vector>(n + c);
    if (normalise) {
      now = normalised(now, statistics, weight + c, bias + c, count);
      store_lanes(n + c, now);
    }
    const Vector before = load_lanes<Vector>(previous + c);
    for (int j = 0; j < kMixes; ++j) {
      const Vector mu = load_lanes<Vector>(mix + j * size + c, count);
      store_lanes(out[j] + c, before + mu * (now - before), count);
    }
  });
}

// `scratch` has two padded rows.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void forward_strip(const ForwardArguments<Element, Scalar>& a,
                               Strip strip,
                               Scalar* scratch) {
  const int64_t size = a.sizes.n_embd;
  const int64_t first_token = strip.row * a.sizes.seq_len;
  Scalar* n = scratch;
  Scalar* previous = scratch + a.sizes.padded();
  if (strip.begin == 0) {
    widen_row<Vector>(a.carry + strip.row * size, previous, size);
  } else {
    const auto statistics = start_token<Vector>(a, first_token + strip.begin - 1, false, previous);
    for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      const Vector s = load_lanes<Vector>(previous + c);
      store_lanes(previous + c, normalised(s, statistics, a.weight + c, a.bias + c, count));
    });
  }
  for (int64_t t = strip.begin; t < strip.end; ++t) {
    const int64_t token = first_token + t;
    const auto statistics = start_token<Vector>(a, token, true, n);
    for (int64_t j = 0; j < a.sizes.num_mixes;) {
      switch (a.sizes.num_mixes - j) {
        case 1:
          mix_row<1, Vector>(a, token, j, statistics, previous, n);
          j += 1;
          break;
        case 2:
          mix_row<2, Vector>(a, token, j, statistics, previous, n);
          j += 2;
          break;
        default:
          mix_row<3, Vector>(a, token, j, statistics, previous, n);
          j += 3;
      }
    }
    std::swap(n, previous);
  }
  if (strip.end == a.sizes.seq_len) {
    for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      store_lanes(a.last + strip.row * size + c, load_lanes<Vector>(previous + c), count);
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
  Scalar* later;  // sum_j (1 - mu_j) g_j of the token after
  Scalar* gn;     // gn weight, of kAtOnce tokens
  Scalar* sums;   // dweight, dbias, then dmu_j: rows of this strip's sums
};
constexpr int64_t kBackwardScratchRows = 1 + kAtOnce;

// later = sum_j (1 - mu_j) g_j of a token, which its predecessor receives.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void gather_later(const BackwardArguments<Element, Scalar>& a,
                              int64_t token,
                              Scalar* later) {
  const int64_t size = a.sizes.n_embd;
  for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    Vector sum = Vector{};
    for (int64_t j = 0; j < a.sizes.num_mixes; ++j) {
      sum += (1 - load_lanes<Vector>(a.mix + j * size + c, count)) *
             load_lanes<Vector>(a.dmixed[j] + token * size + c, count);
    }
    store_lanes(later + c, sum);
  });
}

// What follows the strip's last token sends back: the next strip's first token, or `last`.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void start_later(const BackwardArguments<Element, Scalar>& a,
                             Strip strip,
                             Scalar* later) {
  if (strip.end < a.sizes.seq_len) {
    gather_later<Vector>(a, strip.row * a.sizes.seq_len + strip.end, later);
  } else if (a.dlast != nullptr) {
    widen_row<Vector>(a.dlast + strip.row * a.sizes.n_embd, later, a.sizes.n_embd);
  } else {
    std::fill(later, later + a.sizes.padded(), Scalar{0});
  }
}

// Tokens t to t + kTokens - 1 of a batch row.
template <int kTokens, typename Vector, typename Element, typename Scalar>
RWKV_INLINE void backward_tokens(const BackwardArguments<Element, Scalar>& a,
                                 int64_t row,
                                 int64_t t,
                                 BackwardRows<Scalar> rows) {
  const int64_t size = a.sizes.n_embd;
  const int64_t padded = a.sizes.padded();
  const int64_t num_mixes = a.sizes.num_mixes;
  const int64_t token = row * a.sizes.seq_len + t;
  const Element *weight = a.weight, *bias = a.bias, *mix = a.mix;
  const Element* const* dmixed = a.dmixed;
  const Element* sum = a.sum + token * size;
  const Element* carry = t == 0 ? a.carry + row * size : nullptr;
  Scalar mean[kTokens + 1] = {}, rstd[kTokens + 1] = {};  // of the predecessor, then the tokens
  for (int i = t == 0; i <= kTokens; ++i) {
    mean[i] = a.statistics[2 * (token + i - 1)];
    rstd[i] = a.statistics[2 * (token + i - 1) + 1];
  }

  Vector total[kTokens] = {}, total_xhat[kTokens] = {};
  for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector w = load_lanes<Vector>(weight + c, count);
    const Vector b = load_lanes<Vector>(bias + c, count);
    Vector xhat[kTokens], difference[kTokens];  // n_t - n_{t-1}
    Vector n = carry != nullptr
                   ? load_lanes<Vector>(carry + c, count)
                   : (load_lanes<Vector>(sum - size + c, count) - mean[0]) * rstd[0] * w + b;
    for (int i = 0; i < kTokens; ++i) {
      prefetch(sum + (i - kTokens) * size + c);
      xhat[i] = (load_lanes<Vector>(sum + i * size + c, count) - mean[i + 1]) * rstd[i + 1];
      const Vector next = xhat[i] * w + b;
      difference[i] = next - n;
      n = next;
    }
    // now: sum_j mu_j g_j; later: sum_j (1 - mu_j) g_j.
    Vector now[kTokens] = {}, later[kTokens] = {};
    for (int64_t j = 0; j < num_mixes; ++j) {
      const Vector mu = load_lanes<Vector>(mix + j * size + c, count);
      const Vector rest = 1 - mu;
      const Element* const dmixed_j = dmixed[j] + token * size + c;
      Scalar* const dmu = rows.sums + (2 + j) * padded + c;
      Vector dmu_lanes = load_lanes<Vector>(dmu);
      for (int i = kTokens - 1; i >= 0; --i) {
        prefetch(dmixed_j + (i - kTokens) * size);
        const Vector g = load_lanes<Vector>(dmixed_j + i * size, count);
        now[i] += mu * g;
        later[i] += rest * g;
        dmu_lanes += g * difference[i];
      }
      store_lanes(dmu, dmu_lanes);
    }
    Vector dweight = load_lanes<Vector>(rows.sums + c);
    Vector dbias = load_lanes<Vector>(rows.sums + padded + c);
    Vector from_later = load_lanes<Vector>(rows.later + c);
    for (int i = kTokens - 1; i >= 0; --i) {
      const Vector gn = now[i] + from_later;
      from_later = later[i];
      dweight += gn * xhat[i];
      dbias += gn;
      const Vector scaled = gn * w;
      store_lanes(rows.gn + i * padded + c, scaled);
      total[i] += scaled;
      total_xhat[i] += scaled * xhat[i];
    }
    store_lanes(rows.later + c, from_later);
    store_lanes(rows.sums + c, dweight);
    store_lanes(rows.sums + padded + c, dbias);
  });

  for (int i = 0; i < kTokens; ++i) {
    const Scalar average = sum_of_lanes(total[i]) / static_cast<Scalar>(size);
    const Scalar average_xhat = sum_of_lanes(total_xhat[i]) / static_cast<Scalar>(size);
    const Scalar *gn = rows.gn + i * padded, of_mean = mean[i + 1], of_rstd = rstd[i + 1];
    const Element* const s = sum + i * size;
    const Element* const dsum = a.dsum == nullptr ? nullptr : a.dsum + (token + i) * size;
    Element* const to = a.ds + (token + i) * size;
    for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      const Vector xhat = (load_lanes<Vector>(s + c, count) - of_mean) * of_rstd;
      Vector ds = of_rstd * (load_lanes<Vector>(gn + c) - average - xhat * average_xhat);
      if (dsum != nullptr) {
        prefetch(dsum - kTokens * size + c);
        ds += load_lanes<Vector>(dsum + c, count);
      }
      store_lanes(to + c, ds, count);
    });
  }
}

// `scratch` has kBackwardScratchRows padded rows, `sums` 2 + J rows of zeros.
template <typename Vector, typename Element, typename Scalar>
RWKV_INLINE void backward_strip(const BackwardArguments<Element, Scalar>& a,
                                Strip strip,
                                Scalar* scratch,
                                Scalar* sums) {
  const int64_t size = a.sizes.n_embd;
  const BackwardRows<Scalar> rows{.later = scratch, .gn = scratch + a.sizes.padded(), .sums = sums};
  start_later<Vector>(a, strip, rows.later);
  int64_t end = strip.end;
  for (; end - kAtOnce >= strip.begin; end -= kAtOnce) {
    backward_tokens<kAtOnce, Vector>(a, strip.row, end - kAtOnce, rows);
  }
  for (; end > strip.begin; --end) {
    backward_tokens<1, Vector>(a, strip.row, end - 1, rows);
  }
  if (strip.begin == 0) {
    for_each_vector<Vector>(size, [&](int64_t c, int64_t count) RWKV_INLINE_LAMBDA {
      store_lanes(a.dcarry + strip.row * size + c, load_lanes<Vector>(rows.later + c), count);
    });
  }
}

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
  using Scalar = ScalarOf<Element>;
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
    with_vectors<Scalar>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      forward_strip<Vector>(arguments, strip, scratch.data());
    });
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
  using Scalar = ScalarOf<Element>;
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
    with_vectors<Scalar>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
      backward_strip<Vector>(
          arguments, strip, scratch.data(), sums_data + number * rows * sizes.padded());
    });
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
