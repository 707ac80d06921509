// layer_norm_shift_mix and LayerNorm alone against their definitions in float64: every output,
// every gradient, the mixes once more from what forward saved.
#include <cmath>
#include <memory>

#include "cuda/layer_norm_shift_mix_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

constexpr double kEps = 1e-5;

struct Shape {
  int64_t B, T, C;
  int J;
  bool has_delta;
};

struct Inputs {
  Numbers x, delta, weight, bias, carry, mix, dsum, dlast;
  std::vector<Numbers> dmixed;
};

template <typename Element>
Inputs inputs_of(const Shape& shape) {
  const int64_t tokens = shape.B * shape.T, C = shape.C;
  const auto numbers = [](int64_t size, uint64_t seed, double scale, double offset) {
    Numbers result = normal(size, seed, scale);
    for (double& number : result) {
      number += offset;
    }
    return rounded<Element>(result);
  };
  Inputs in{.x = numbers(tokens * C, 1, 2, 0.5),
            .delta = numbers(tokens * C, 2, 1, 0),
            .weight = numbers(C, 3, 0.3, 1),
            .bias = numbers(C, 4, 0.3, 0),
            .carry = numbers(shape.B * C, 5, 1, 0),
            .mix = numbers(std::max(shape.J, 1) * C, 6, 0.3, 0.5),
            .dsum = numbers(tokens * C, 7, 1, 0),
            .dlast = numbers(shape.B * C, 8, 1, 0),
            .dmixed = {}};
  for (int j = 0; j < std::max(shape.J, 1); ++j) {
    in.dmixed.push_back(numbers(tokens * C, 10 + static_cast<uint64_t>(j), 1, 0));
  }
  return in;
}

// ---- The definition -----------------------------------------------------------------------------

struct Reference {
  Numbers sum, last, statistics;
  std::vector<Numbers> mixed;
  Numbers ds, dweight, dbias, dcarry, dmix;
};

template <typename Element>
Reference reference(const Shape& shape, const Inputs& in) {
  const auto B = static_cast<size_t>(shape.B), T = static_cast<size_t>(shape.T),
             C = static_cast<size_t>(shape.C), J = static_cast<size_t>(shape.J);
  Reference out;
  out.sum = in.x;
  if (shape.has_delta) {
    for (size_t i = 0; i < out.sum.size(); ++i) {
      // Rounded before it is normalised, as fp32 sums are.
      const auto sum = static_cast<float>(in.x[i]) + static_cast<float>(in.delta[i]);
      out.sum[i] = rounded<Element>({sum})[0];
    }
  }
  const size_t num_outputs = std::max<size_t>(J, 1);
  Numbers n(B * T * C), xhat(B * T * C);
  out.mixed.assign(num_outputs, Numbers(B * T * C));
  for (size_t token = 0; token < B * T; ++token) {
    const double* s = out.sum.data() + token * C;
    double mean = 0, variance = 0;
    for (size_t c = 0; c < C; ++c) {
      mean += s[c] / static_cast<double>(C);
    }
    for (size_t c = 0; c < C; ++c) {
      variance += (s[c] - mean) * (s[c] - mean) / static_cast<double>(C);
    }
    const double rstd = 1 / std::sqrt(variance + kEps);
    out.statistics.push_back(mean);
    out.statistics.push_back(rstd);
    for (size_t c = 0; c < C; ++c) {
      xhat[token * C + c] = (s[c] - mean) * rstd;
      n[token * C + c] = xhat[token * C + c] * in.weight[c] + in.bias[c];
    }
  }
  const auto before = [&](size_t b, size_t t, size_t c) {
    return t == 0 ? in.carry[b * C + c] : n[(b * T + t - 1) * C + c];
  };
  out.ds = in.dsum;
  out.dweight.assign(C, 0);
  out.dbias.assign(C, 0);
  out.dcarry.assign(B * C, 0);
  out.dmix.assign(J * C, 0);
  for (size_t b = 0; b < B; ++b) {
    for (size_t t = 0; t < T; ++t) {
      const size_t at = (b * T + t) * C;
      Numbers gn(C);
      for (size_t c = 0; c < C; ++c) {
        if (J == 0) {
          out.mixed[0][at + c] = n[at + c];
          gn[c] = in.dmixed[0][at + c];
        }
        for (size_t j = 0; j < J; ++j) {
          const double mu = in.mix[j * C + c], g = in.dmixed[j][at + c];
          out.mixed[j][at + c] = n[at + c] * mu + before(b, t, c) * (1 - mu);
          gn[c] += mu * g;
          out.dmix[j * C + c] += g * (n[at + c] - before(b, t, c));
          if (t == 0) {
            out.dcarry[b * C + c] += (1 - mu) * g;
          }
          if (t + 1 < T) {
            gn[c] += (1 - mu) * in.dmixed[j][at + C + c];
          }
        }
        if (J > 0 && t + 1 == T) {
          out.last.push_back(n[at + c]);
          gn[c] += in.dlast[b * C + c];
        }
        out.dweight[c] += gn[c] * xhat[at + c];
        out.dbias[c] += gn[c];
      }
      double mean = 0, mean_xhat = 0;
      for (size_t c = 0; c < C; ++c) {
        mean += gn[c] * in.weight[c] / static_cast<double>(C);
        mean_xhat += gn[c] * in.weight[c] * xhat[at + c] / static_cast<double>(C);
      }
      const double rstd = out.statistics[2 * (b * T + t) + 1];
      for (size_t c = 0; c < C; ++c) {
        out.ds[at + c] += rstd * (gn[c] * in.weight[c] - mean - xhat[at + c] * mean_xhat);
      }
    }
  }
  return out;
}

// ---- The kernels --------------------------------------------------------------------------------

LayerNormShiftMixSizes sizes_of(const Shape& shape) {
  return {.batch_size = shape.B, .seq_len = shape.T, .n_embd = shape.C, .num_mixes = shape.J};
}

// Of what the mixes do not touch without a mix: nothing.
template <typename Element>
std::vector<std::unique_ptr<DeviceArray<Element>>> arrays(size_t count, int64_t size) {
  std::vector<std::unique_ptr<DeviceArray<Element>>> result;
  for (size_t i = 0; i < count; ++i) {
    result.push_back(std::make_unique<DeviceArray<Element>>(size));
  }
  return result;
}

// sum, statistics, last (with mixes), then each mix, then each mix made again.
template <typename Element>
Outputs run_forward(const Shape& shape, const Inputs& in) {
  const int64_t size = shape.B * shape.T * shape.C;
  const auto num_outputs = static_cast<size_t>(std::max(shape.J, 1));
  const DeviceArray<Element> x(in.x), delta(in.delta), weight(in.weight), bias(in.bias),
      carry(in.carry), mix(in.mix);
  DeviceArray<Element> sum(size), last(shape.B * shape.C);
  DeviceArray<float> statistics(2 * shape.B * shape.T);
  const auto mixed = arrays<Element>(num_outputs, size), again = arrays<Element>(num_outputs, size);
  LayerNormShiftMixForward<Element> forward{.sizes = sizes_of(shape),
                                            .eps = static_cast<float>(kEps),
                                            .x = x.data(),
                                            .delta = shape.has_delta ? delta.data() : nullptr,
                                            .weight = weight.data(),
                                            .bias = bias.data(),
                                            .carry = carry.data(),
                                            .mix = mix.data(),
                                            .sum = shape.has_delta ? sum.data() : nullptr,
                                            .last = last.data(),
                                            .statistics = statistics.data()};
  LayerNormShiftMixAgain<Element> repeat{.sizes = forward.sizes,
                                         .sum = shape.has_delta ? sum.data() : x.data(),
                                         .statistics = statistics.data(),
                                         .weight = weight.data(),
                                         .bias = bias.data(),
                                         .carry = carry.data(),
                                         .mix = mix.data()};
  for (size_t j = 0; j < num_outputs; ++j) {
    forward.mixed[j] = mixed[j]->data();
    repeat.mixed[j] = again[j]->data();
  }
  expect_launched(launch_layer_norm_shift_mix(forward, nullptr), "layer_norm_shift_mix");
  expect_launched(launch_layer_norm_shift_mix_again(repeat, nullptr), "layer_norm_shift_mix again");
  Outputs outputs{shape.has_delta ? sum.numbers() : in.x, statistics.numbers()};
  if (shape.J > 0) {
    outputs.push_back(last.numbers());
  }
  for (const auto& array : mixed) {
    outputs.push_back(array->numbers());
  }
  for (const auto& array : again) {
    outputs.push_back(array->numbers());
  }
  return outputs;
}

// ds, dweight, dbias, then with mixes dcarry and dmix.
template <typename Element>
Outputs run_backward(const Shape& shape, const Inputs& in, const Reference& expected) {
  const int64_t size = shape.B * shape.T * shape.C;
  const DeviceArray<Element> sum(expected.sum), weight(in.weight), bias(in.bias), carry(in.carry),
      mix(in.mix), dsum(in.dsum), dlast(in.dlast);
  const DeviceArray<float> statistics(expected.statistics);
  std::vector<std::unique_ptr<DeviceArray<Element>>> dmixed;
  for (const Numbers& numbers : in.dmixed) {
    dmixed.push_back(std::make_unique<DeviceArray<Element>>(numbers));
  }
  DeviceArray<Element> ds(size), dweight(shape.C), dbias(shape.C), dcarry(shape.B * shape.C),
      dmix(shape.J * shape.C);
  DeviceArray<float> scratch(layer_norm_shift_mix_scratch_size(sizes_of(shape)));
  LayerNormShiftMixBackward<Element> backward{.sizes = sizes_of(shape),
                                              .sum = sum.data(),
                                              .statistics = statistics.data(),
                                              .weight = weight.data(),
                                              .bias = bias.data(),
                                              .carry = carry.data(),
                                              .mix = mix.data(),
                                              .dsum = dsum.data(),
                                              .dlast = dlast.data(),
                                              .ds = ds.data(),
                                              .dweight = dweight.data(),
                                              .dbias = dbias.data(),
                                              .dcarry = dcarry.data(),
                                              .dmix = dmix.data(),
                                              .scratch = scratch.data()};
  for (size_t j = 0; j < dmixed.size(); ++j) {
    backward.dmixed[j] = dmixed[j]->data();
  }
  expect_launched(launch_layer_norm_shift_mix_backward(backward, nullptr),
                  "layer_norm_shift_mix backward");
  Outputs outputs{ds.numbers(), dweight.numbers(), dbias.numbers()};
  if (shape.J > 0) {
    outputs.push_back(dcarry.numbers());
    outputs.push_back(dmix.numbers());
  }
  return outputs;
}

// `orders`: also in shuffled orders of lanes, which takes its time where a row is wide.
template <typename Element>
void expect_matches(const Shape& shape, bool orders = true) {
  const auto run = [orders](const std::function<Outputs()>& work) {
    return orders ? same_in_every_order(work) : work();
  };
  SCOPED_TRACE(testing::Message() << "B " << shape.B << " T " << shape.T << " C " << shape.C
                                  << " J " << shape.J << (shape.has_delta ? " with delta" : ""));
  constexpr bool kIsHalf = sizeof(Element) == 2;
  const Inputs in = inputs_of<Element>(shape);
  const Reference expected = reference<Element>(shape, in);

  // A result rounded once; in fp32 the few roundings of a row's sums.
  constexpr double kValues = kIsHalf ? 4e-3 : 2e-6;
  const Outputs forward = run([&] { return run_forward<Element>(shape, in); });
  EXPECT_TRUE(close(forward[0], expected.sum, 0)) << "sum";
  EXPECT_TRUE(close(forward[1], expected.statistics, 2e-6)) << "statistics";
  size_t output = 2;
  if (shape.J > 0) {
    EXPECT_TRUE(close(forward[output++], expected.last, kValues)) << "last";
  }
  const size_t num_mixed = expected.mixed.size();
  for (size_t j = 0; j < num_mixed; ++j) {
    EXPECT_TRUE(close(forward[output + j], expected.mixed[j], kValues)) << "mix " << j;
    EXPECT_EQ(forward[output + num_mixed + j], forward[output + j]) << "mix " << j << " again";
  }

  // A single channel is normalised to its bias: its gradient is a difference of equal numbers.
  const double gradients = shape.C == 1 ? 1e-2 : kIsHalf ? 4e-3 : 5e-6;
  const Outputs backward = run([&] { return run_backward<Element>(shape, in, expected); });
  EXPECT_TRUE(close(backward[0], expected.ds, gradients)) << "ds";
  if (shape.C > 1) {
    EXPECT_TRUE(close(backward[1], expected.dweight, gradients)) << "dweight";
  }
  EXPECT_TRUE(close(backward[2], expected.dbias, gradients)) << "dbias";
  if (shape.J > 0) {
    EXPECT_TRUE(close(backward[3], expected.dcarry, gradients)) << "dcarry";
    EXPECT_TRUE(close(backward[4], expected.dmix, gradients)) << "dmix";
  }
}

template <typename Element>
class LayerNormShiftMixKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(LayerNormShiftMixKernel, Elements);

TYPED_TEST(LayerNormShiftMixKernel, MatchesTheDefinitionAtLengthsThatDoNotFit) {
  for (const int64_t T : {1, 15, 16, 17, 63, 129}) {
    expect_matches<TypeParam>({.B = 1, .T = T, .C = 65, .J = 2, .has_delta = true});
    expect_matches<TypeParam>({.B = 3, .T = T, .C = 64, .J = 3, .has_delta = T % 2 == 0});
  }
  expect_matches<TypeParam>({.B = 1, .T = 257, .C = 63, .J = 3, .has_delta = false});
}

TYPED_TEST(LayerNormShiftMixKernel, MatchesTheDefinitionAtWidthsThatDoNotFit) {
  for (const int64_t C : {1, 63, 65, 264, 768}) {
    expect_matches<TypeParam>({.B = 3, .T = 17, .C = C, .J = 3, .has_delta = true});
  }
}

TYPED_TEST(LayerNormShiftMixKernel, MatchesTheDefinitionForOneToSixMixes) {
  for (const int J : {1, 2, 3, 4, 5, 6}) {
    expect_matches<TypeParam>({.B = 2, .T = 19, .C = 72, .J = J, .has_delta = true});
    expect_matches<TypeParam>({.B = 2, .T = 7, .C = 35, .J = J, .has_delta = false});
  }
}

TYPED_TEST(LayerNormShiftMixKernel, IsALayerNormWithoutMixes) {
  for (const int64_t C : {1, 40, 65, 768}) {
    expect_matches<TypeParam>({.B = 3, .T = 17, .C = C, .J = 0, .has_delta = false});
  }
}

TYPED_TEST(LayerNormShiftMixKernel, TakesRowsOfEightThousandChannels) {
  expect_matches<TypeParam>({.B = 1, .T = 3, .C = 8192, .J = 3, .has_delta = true}, false);
  const LayerNormShiftMixForward<TypeParam> wide{
      .sizes = {.batch_size = 1, .seq_len = 1, .n_embd = 8193, .num_mixes = 1}};
  EXPECT_EQ(launch_layer_norm_shift_mix(wide, nullptr), cudaErrorInvalidValue);
}

TYPED_TEST(LayerNormShiftMixKernel, KeepsItsPrecisionFarFromZero) {
  const Shape shape{.B = 1, .T = 9, .C = 768, .J = 2, .has_delta = false};
  Inputs in = inputs_of<TypeParam>(shape);
  for (double& x : in.x) {
    x += 4096;
  }
  in.x = rounded<TypeParam>(in.x);
  const Reference expected = reference<TypeParam>(shape, in);
  const Outputs outputs = run_forward<TypeParam>(shape, in);
  // The mean of numbers near 4096 has an error of up to 2^-12 in fp32, of rows 2 wide.
  EXPECT_TRUE(close(outputs[3], expected.mixed[0], sizeof(TypeParam) == 2 ? 4e-3 : 3e-4));
}

TYPED_TEST(LayerNormShiftMixKernel, LaunchesNothingForNoTokens) {
  EXPECT_EQ(launch_layer_norm_shift_mix(LayerNormShiftMixForward<TypeParam>{}, nullptr),
            cudaSuccess);
  EXPECT_EQ(launch_layer_norm_shift_mix_backward(LayerNormShiftMixBackward<TypeParam>{}, nullptr),
            cudaSuccess);
}

}  // namespace
}  // namespace rwkv::test
