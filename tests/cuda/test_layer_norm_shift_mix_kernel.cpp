// layer_norm_shift_mix, forward and backward, against its equations in float64.
#include <algorithm>
#include <cmath>
#include <memory>
#include <ostream>

#include "cuda/layer_norm_shift_mix_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

constexpr float kEps = 1e-5f;

enum class Optional { kGiven, kNone };  // delta; gradients of the sum and of the last row

struct Case {
  LayerNormShiftMixSizes sizes;
  Optional optional = Optional::kGiven;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "B " << c.sizes.batch_size << ", T " << c.sizes.seq_len << ", C " << c.sizes.n_embd
             << ", J " << c.sizes.num_mixes
             << (c.optional == Optional::kGiven ? "" : ", without delta");
}

// Every number of mixes and both paths; rows that end in the first warp, at its end and behind it;
// tokens that do not fill a step, a block or the grid.
const Case kCases[] = {
    {{1, 1, 1, 3}},
    {{3, 1, 64, 3}},
    {{1, 15, 63, 3}},
    {{3, 16, 65, 2}, Optional::kNone},
    {{1, 17, 64, 1}},
    {{3, 63, 64, 3}},
    {{1, 129, 65, 3}, Optional::kNone},
    {{3, 129, 8, 2}},
    {{1, 257, 64, 3}},
    {{1, 257, 1, 6}},
    {{3, 17, 264, 4}},
    {{1, 9, 520, 5}},
    {{3, 16, 256, 6}, Optional::kNone},
    {{1, 7, 300, 6}},
    {{1, 5, 768, 3}},
    // LayerNorm alone.
    {{1, 1, 63, 0}},
    {{3, 63, 65, 0}},
    {{1, 129, 64, 0}},
    {{3, 15, 264, 0}, Optional::kNone},
};

struct Inputs {
  Numbers x, delta, weight, bias, carry, mix, dsum, dlast;
  std::vector<Numbers> dmixed;
};

// Numbers that a variance from squares alone would lose: the mean is 20 deviations away.
template <typename Element>
Inputs inputs_of(const Case& c) {
  const auto& sizes = c.sizes;
  const int64_t channels = sizes.n_embd;
  const int64_t size = sizes.batch_size * sizes.seq_len * channels;
  Inputs in{.x = normal(size, 1),
            .delta = rounded<Element>(normal(size, 2)),
            .weight = normal(channels, 3, 0.3),
            .bias = rounded<Element>(normal(channels, 4)),
            .carry = rounded<Element>(normal(sizes.batch_size * channels, 5)),
            .mix = normal(sizes.num_mixes * channels, 6, 0.3),
            .dsum = rounded<Element>(normal(size, 7)),
            .dlast = rounded<Element>(normal(sizes.batch_size * channels, 8)),
            .dmixed = {}};
  for (double& x : in.x) {
    x += 20;
  }
  for (double& weight : in.weight) {
    weight += 1;
  }
  for (double& mix : in.mix) {
    mix += 0.5;
  }
  in.x = rounded<Element>(in.x);
  in.weight = rounded<Element>(in.weight);
  in.mix = rounded<Element>(in.mix);
  for (int j = 0; j < std::max(sizes.num_mixes, 1); ++j) {
    in.dmixed.push_back(rounded<Element>(normal(size, 9 + static_cast<uint64_t>(j))));
  }
  if (c.optional == Optional::kNone) {
    in.delta.assign(in.delta.size(), 0);
    in.dsum.assign(in.dsum.size(), 0);
    in.dlast.assign(in.dlast.size(), 0);
  }
  return in;
}

// ---- The equations ------------------------------------------------------------------------------

struct Reference {
  Numbers sum, last, statistics;
  std::vector<Numbers> mixed;
  Numbers xhat, n;
};

template <typename Element>
Reference reference_forward(const LayerNormShiftMixSizes& sizes, const Inputs& in) {
  const auto channels = static_cast<size_t>(sizes.n_embd);
  const auto seq_len = static_cast<size_t>(sizes.seq_len);
  const auto tokens = static_cast<size_t>(sizes.batch_size) * seq_len;
  Reference out;
  out.sum = in.x;
  for (size_t i = 0; i < out.sum.size(); ++i) {
    out.sum[i] += in.delta[i];
  }
  out.sum = rounded<Element>(out.sum);
  for (size_t token = 0; token < tokens; ++token) {
    const double* const s = &out.sum[token * channels];
    double mean = 0, variance = 0;
    for (size_t c = 0; c < channels; ++c) {
      mean += s[c] / static_cast<double>(channels);
    }
    for (size_t c = 0; c < channels; ++c) {
      variance += (s[c] - mean) * (s[c] - mean) / static_cast<double>(channels);
    }
    const double rstd = 1 / std::sqrt(variance + kEps);
    out.statistics.push_back(mean);
    out.statistics.push_back(rstd);
    for (size_t c = 0; c < channels; ++c) {
      out.xhat.push_back((s[c] - mean) * rstd);
      out.n.push_back(out.xhat.back() * in.weight[c] + in.bias[c]);
    }
  }
  if (sizes.num_mixes == 0) {
    out.mixed.push_back(out.n);
    return out;
  }
  for (size_t j = 0; j < static_cast<size_t>(sizes.num_mixes); ++j) {
    Numbers& mixed = out.mixed.emplace_back();
    for (size_t i = 0; i < out.n.size(); ++i) {
      const size_t token = i / channels, c = i % channels;
      const double before =
          token % seq_len == 0 ? in.carry[token / seq_len * channels + c] : out.n[i - channels];
      const double mu = in.mix[j * channels + c];
      mixed.push_back(out.n[i] * mu + before * (1 - mu));
    }
  }
  for (size_t row = 1; row <= static_cast<size_t>(sizes.batch_size); ++row) {
    for (size_t c = 0; c < channels; ++c) {
      out.last.push_back(out.n[(row * seq_len - 1) * channels + c]);
    }
  }
  return out;
}

// ds, dweight, dbias, dcarry, dmix.
Outputs reference_backward(const LayerNormShiftMixSizes& sizes,
                           const Inputs& in,
                           const Reference& forward) {
  const auto channels = static_cast<size_t>(sizes.n_embd);
  const auto seq_len = static_cast<size_t>(sizes.seq_len);
  Numbers ds(in.x.size()), dweight(channels), dbias(channels), dcarry(in.carry.size()),
      dmix(in.mix.size());
  Numbers dn(in.x.size());
  for (size_t i = 0; i < dn.size(); ++i) {
    const size_t token = i / channels, c = i % channels;
    const size_t row = token / seq_len;
    const bool first = token % seq_len == 0, last = token % seq_len == seq_len - 1;
    if (sizes.num_mixes == 0) {
      dn[i] += in.dmixed[0][i];
    } else if (last) {
      dn[i] += in.dlast[row * channels + c];
    }
    for (size_t j = 0; j < static_cast<size_t>(sizes.num_mixes); ++j) {
      const double mu = in.mix[j * channels + c], g = in.dmixed[j][i];
      dn[i] += mu * g;
      double& before_gradient = first ? dcarry[row * channels + c] : dn[i - channels];
      before_gradient += (1 - mu) * g;
      const double before = first ? in.carry[row * channels + c] : forward.n[i - channels];
      dmix[j * channels + c] += g * (forward.n[i] - before);
    }
  }
  for (size_t token = 0; token * channels < dn.size(); ++token) {
    double average = 0, average_xhat = 0;
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = token * channels + c;
      dweight[c] += dn[i] * forward.xhat[i];
      dbias[c] += dn[i];
      average += dn[i] * in.weight[c] / static_cast<double>(channels);
      average_xhat += dn[i] * in.weight[c] * forward.xhat[i] / static_cast<double>(channels);
    }
    for (size_t c = 0; c < channels; ++c) {
      const size_t i = token * channels + c;
      ds[i] = in.dsum[i] + forward.statistics[2 * token + 1] *
                               (dn[i] * in.weight[c] - average - forward.xhat[i] * average_xhat);
    }
  }
  return {ds, dweight, dbias, dcarry, dmix};
}

// ---- The kernels --------------------------------------------------------------------------------

// sum (empty without delta), last, statistics, mixed_0, ...
template <typename Element>
Outputs run_forward(const Case& c, const Inputs& in) {
  const bool has_delta = c.optional == Optional::kGiven;
  const auto size = static_cast<int64_t>(in.x.size());
  const DeviceArray<Element> x(in.x), delta(in.delta), weight(in.weight), bias(in.bias),
      carry(in.carry), mix(in.mix);
  DeviceArray<Element> sum(has_delta ? size : 0);
  DeviceArray<Element> last(c.sizes.num_mixes > 0 ? carry.size() : 0);
  DeviceArray<float> statistics(2 * c.sizes.batch_size * c.sizes.seq_len);
  std::vector<std::unique_ptr<DeviceArray<Element>>> mixed;
  LayerNormShiftMixForward<Element> arguments{.sizes = c.sizes,
                                              .eps = kEps,
                                              .x = x.data(),
                                              .delta = has_delta ? delta.data() : nullptr,
                                              .weight = weight.data(),
                                              .bias = bias.data(),
                                              .carry = carry.data(),
                                              .mix = mix.data(),
                                              .sum = has_delta ? sum.data() : nullptr,
                                              .last = last.data(),
                                              .statistics = statistics.data()};
  for (size_t j = 0; j < in.dmixed.size(); ++j) {
    mixed.push_back(std::make_unique<DeviceArray<Element>>(size));
    arguments.mixed[j] = mixed.back()->data();
  }
  expect_launched(launch_layer_norm_shift_mix(arguments, nullptr), "layer_norm_shift_mix");
  Outputs out{sum.numbers(), last.numbers(), statistics.numbers()};
  for (const auto& output : mixed) {
    out.push_back(output->numbers());
  }
  return out;
}

template <typename Element>
Outputs run_backward(const Case& c, const Inputs& in, const Reference& forward) {
  const bool given = c.optional == Optional::kGiven;
  const DeviceArray<Element> sum(forward.sum), weight(in.weight), bias(in.bias), carry(in.carry),
      mix(in.mix), dsum(in.dsum), dlast(in.dlast);
  const DeviceArray<float> statistics(forward.statistics);
  DeviceArray<Element> ds(sum.size()), dweight(weight.size()), dbias(weight.size()),
      dcarry(c.sizes.num_mixes > 0 ? carry.size() : 0), dmix(mix.size());
  DeviceArray<float> scratch(layer_norm_shift_mix_scratch_size(c.sizes));
  std::vector<std::unique_ptr<DeviceArray<Element>>> dmixed;
  LayerNormShiftMixBackward<Element> arguments{.sizes = c.sizes,
                                               .sum = sum.data(),
                                               .statistics = statistics.data(),
                                               .weight = weight.data(),
                                               .bias = bias.data(),
                                               .carry = carry.data(),
                                               .mix = mix.data(),
                                               .dsum = given ? dsum.data() : nullptr,
                                               .dlast = given ? dlast.data() : nullptr,
                                               .ds = ds.data(),
                                               .dweight = dweight.data(),
                                               .dbias = dbias.data(),
                                               .dcarry = dcarry.data(),
                                               .dmix = dmix.data(),
                                               .scratch = scratch.data()};
  for (size_t j = 0; j < in.dmixed.size(); ++j) {
    dmixed.push_back(std::make_unique<DeviceArray<Element>>(in.dmixed[j]));
    arguments.dmixed[j] = dmixed.back()->data();
  }
  expect_launched(launch_layer_norm_shift_mix_backward(arguments, nullptr),
                  "layer_norm_shift_mix backward");
  return {ds.numbers(), dweight.numbers(), dbias.numbers(), dcarry.numbers(), dmix.numbers()};
}

// ---- The tests ----------------------------------------------------------------------------------

template <typename Element>
class LayerNormShiftMixKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(LayerNormShiftMixKernel, Elements);

// bf16: half a unit of 8 bits is at most 4e-3 of a number. fp32: s - mean loses 5 of 24 bits at
// numbers around 20, and the rest is that of a few operations.
template <typename Element>
constexpr double kTolerance = sizeof(Element) == 2 ? 4e-3 : 1e-5;

TYPED_TEST(LayerNormShiftMixKernel, ForwardMatchesTheEquations) {
  for (const Case& c : kCases) {
    const Inputs in = inputs_of<TypeParam>(c);
    const auto outputs = same_in_every_order([&] { return run_forward<TypeParam>(c, in); });
    const Reference expected = reference_forward<TypeParam>(c.sizes, in);
    if (c.optional == Optional::kGiven) {
      EXPECT_TRUE(close(outputs[0], expected.sum, kTolerance<TypeParam>)) << c;
    }
    // Where a row is one number, its variance is zero and n the bias.
    EXPECT_TRUE(close(outputs[1], expected.last, kTolerance<TypeParam>)) << c;
    EXPECT_TRUE(close(outputs[2], expected.statistics, 1e-5)) << c;
    for (size_t j = 0; j < expected.mixed.size(); ++j) {
      EXPECT_TRUE(close(outputs[3 + j], expected.mixed[j], kTolerance<TypeParam>))
          << c << ", mix " << j;
    }
  }
}

TYPED_TEST(LayerNormShiftMixKernel, BackwardMatchesTheEquations) {
  const char* const names[] = {"ds", "dweight", "dbias", "dcarry", "dmix"};
  for (const Case& c : kCases) {
    const Inputs in = inputs_of<TypeParam>(c);
    const Reference forward = reference_forward<TypeParam>(c.sizes, in);
    const auto outputs =
        same_in_every_order([&] { return run_backward<TypeParam>(c, in, forward); });
    Outputs expected = reference_backward(c.sizes, in, forward);
    if (c.sizes.num_mixes == 0) {
      expected[3].clear();
    }
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_TRUE(close(outputs[i], expected[i], kTolerance<TypeParam>)) << names[i] << ", " << c;
    }
  }
}

// The largest rows of either kernel, once: the host runner takes its time for a thousand threads.
TYPED_TEST(LayerNormShiftMixKernel, TakesRowsUpToTheLargest) {
  for (const int64_t n_embd : {int64_t{4096}, kMaxChannels}) {
    const Case c{{1, 2, n_embd, 1}};
    const Inputs in = inputs_of<TypeParam>(c);
    const Reference expected = reference_forward<TypeParam>(c.sizes, in);
    EXPECT_TRUE(close(run_forward<TypeParam>(c, in)[3], expected.mixed[0], kTolerance<TypeParam>))
        << c;
    EXPECT_TRUE(close(run_backward<TypeParam>(c, in, expected)[0],
                      reference_backward(c.sizes, in, expected)[0],
                      kTolerance<TypeParam>))
        << c;
  }
}

// A sequence in two parts, the carry handed over, is the sequence.
TYPED_TEST(LayerNormShiftMixKernel, CarriesOverFromPartToPart) {
  const Case whole{{1, 12, 64, 2}};
  const Inputs in = inputs_of<TypeParam>(whole);
  const Outputs expected = run_forward<TypeParam>(whole, in);
  constexpr ptrdiff_t kSplit = 5 * 64;
  Inputs first = in, second = in;
  first.x.resize(kSplit), first.delta.resize(kSplit);
  second.x.erase(second.x.begin(), second.x.begin() + kSplit);
  second.delta.erase(second.delta.begin(), second.delta.begin() + kSplit);
  const Outputs left = run_forward<TypeParam>({{1, 5, 64, 2}}, first);
  second.carry = left[1];
  const Outputs right = run_forward<TypeParam>({{1, 7, 64, 2}}, second);
  for (const size_t j : {3, 4}) {
    Numbers joined = left[j];
    joined.insert(joined.end(), right[j].begin(), right[j].end());
    EXPECT_TRUE(close(joined, expected[j], kTolerance<TypeParam>)) << "mix " << j - 3;
  }
}

// Rows that do not start at 16 bytes go element by element.
TYPED_TEST(LayerNormShiftMixKernel, TakesTensorsOfAnyAlignment) {
  const Case c{{1, 9, 64, 1}};
  const Inputs in = inputs_of<TypeParam>(c);
  const Outputs expected = run_forward<TypeParam>(c, in);
  Numbers shifted{0};
  shifted.insert(shifted.end(), in.x.begin(), in.x.end());
  const DeviceArray<TypeParam> x(shifted), delta(in.delta), weight(in.weight), bias(in.bias),
      carry(in.carry), mix(in.mix);
  DeviceArray<TypeParam> sum(delta.size()), last(carry.size()), mixed(delta.size());
  DeviceArray<float> statistics(18);
  expect_launched(launch_layer_norm_shift_mix<TypeParam>({.sizes = c.sizes,
                                                          .eps = kEps,
                                                          .x = x.data() + 1,
                                                          .delta = delta.data(),
                                                          .weight = weight.data(),
                                                          .bias = bias.data(),
                                                          .carry = carry.data(),
                                                          .mix = mix.data(),
                                                          .sum = sum.data(),
                                                          .last = last.data(),
                                                          .statistics = statistics.data(),
                                                          .mixed = {mixed.data()}},
                                                         nullptr),
                  "layer_norm_shift_mix");
  EXPECT_TRUE(close(mixed.numbers(), expected[3], kTolerance<TypeParam>));
}

TYPED_TEST(LayerNormShiftMixKernel, RefusesWhatItHasNoKernelFor) {
  using Forward = LayerNormShiftMixForward<TypeParam>;
  EXPECT_EQ(launch_layer_norm_shift_mix(Forward{.sizes = {1, 1, kMaxChannels + 1, 1}}, nullptr),
            cudaErrorInvalidValue);
  EXPECT_EQ(launch_layer_norm_shift_mix(Forward{.sizes = {1, 1, 8, kMaxMixes + 1}}, nullptr),
            cudaErrorInvalidValue);
  using Backward = LayerNormShiftMixBackward<TypeParam>;
  EXPECT_EQ(
      launch_layer_norm_shift_mix_backward(Backward{.sizes = {1, 1, kMaxChannels + 1, 1}}, nullptr),
      cudaErrorInvalidValue);
}

TYPED_TEST(LayerNormShiftMixKernel, NothingIsLaunchedForNoTokens) {
  EXPECT_EQ(launch_layer_norm_shift_mix(LayerNormShiftMixForward<TypeParam>{.sizes = {0, 4, 8, 1}},
                                        nullptr),
            cudaSuccess);
  EXPECT_EQ(layer_norm_shift_mix_scratch_size({0, 4, 8, 1}), 0);
}

}  // namespace
}  // namespace rwkv::test
