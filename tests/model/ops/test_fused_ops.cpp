// The fused ops between matrix products, each against plain Torch maths: values and every gradient
// in fp64, in fp32 within twice the error of plain fp32, in bf16 within its rounding.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/ops/cross_entropy.h"
#include "model/ops/embedding.h"
#include "model/ops/few_rows_linear.h"
#include "model/ops/gated_residual.h"
#include "model/ops/layer_norm_shift_mix.h"
#include "model/ops/relu_squared.h"
#include "tests/support/reference_ops.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using Tensors = std::vector<at::Tensor>;
using Function = std::function<Tensors(const Tensors&)>;

// Makes at::empty fill what it allocates with NaN, so that an element left unwritten shows.
class FillEmptyWithNan {
 public:
  FillEmptyWithNan() { at::globalContext().setDeterministicAlgorithms(true, true); }
  ~FillEmptyWithNan() { at::globalContext().setDeterministicAlgorithms(false, false); }
};

at::Tensor normal(at::IntArrayRef shape, uint64_t seed) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(shape, generator, at::kDouble);
}

Tensors in_dtype(const Tensors& tensors, at::ScalarType dtype) {
  Tensors result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.to(dtype));
  }
  return result;
}

// Outputs of `function`, then the gradients of its inputs, for output gradients that are functions
// of the place alone. Everything in fp64 when compared.
Tensors values_and_gradients(const Function& function, const Tensors& inputs) {
  Tensors leaves;
  for (const at::Tensor& input : inputs) {
    leaves.push_back(input.detach().clone().set_requires_grad(true));
  }
  Tensors results;
  at::Tensor target = at::zeros({}, at::kDouble);
  const Tensors outputs = function(leaves);
  for (size_t i = 0; i < outputs.size(); ++i) {
    results.push_back(outputs[i].detach().clone());
    const at::Tensor weight = normal(outputs[i].sizes(), 1000 + i);
    target = target + (outputs[i] * weight.to(outputs[i].scalar_type())).sum().to(at::kDouble);
  }
  target.backward();
  for (const at::Tensor& leaf : leaves) {
    results.push_back(leaf.grad().defined() ? leaf.grad() : at::zeros_like(leaf));
  }
  return results;
}

void expect_close(const Tensors& actual, const Tensors& expected, double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(test::close_l2(actual[i], expected[i], tolerance)) << "result " << i;
  }
}

// Compares with the reference in the three dtypes, and with itself on one thread.
void expect_matches(const Function& op, const Function& reference, const Tensors& inputs) {
  const FillEmptyWithNan fill;
  expect_close(values_and_gradients(op, inputs), values_and_gradients(reference, inputs), 1e-12);

  const Tensors single = in_dtype(inputs, at::kFloat);
  const Tensors actual = values_and_gradients(op, single);
  const Tensors plain = values_and_gradients(reference, single);
  const Tensors exact = values_and_gradients(reference, in_dtype(single, at::kDouble));
  for (size_t i = 0; i < actual.size(); ++i) {
    const bool is_zero = exact[i].abs().max().item<double>() == 0;
    const double allowed = is_zero ? 0 : 2 * test::relative_l2(plain[i], exact[i]) + 1e-6;
    EXPECT_TRUE(test::close_l2(actual[i], exact[i], allowed)) << "result " << i << " in fp32";
  }

  // Two roundings of the output, and those of an intermediate that is stored.
  const Tensors half = in_dtype(inputs, at::kBFloat16);
  const Tensors half_exact = values_and_gradients(reference, in_dtype(half, at::kDouble));
  const Tensors half_actual = values_and_gradients(op, half);
  for (size_t i = 0; i < half_actual.size(); ++i) {
    EXPECT_TRUE(test::close_l2(half_actual[i], half_exact[i], 1.0 / 100))
        << "result " << i << " in bf16";
  }

  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Tensors again = values_and_gradients(op, single);
  at::set_num_threads(threads);
  for (size_t i = 0; i < actual.size(); ++i) {
    EXPECT_TRUE(test::same_bits(again[i], actual[i])) << "result " << i << " on one thread";
  }
}

// ---- layer_norm_shift_mix -----------------------------------------------------------------------

// Inputs x, delta, weight, bias, carry, mix.
Tensors shift_mix_inputs(int64_t B, int64_t T, int64_t C, int64_t J) {
  return {normal({B, T, C}, 1) * 2 + 0.5,
          normal({B, T, C}, 2),
          normal({C}, 3) + 1,
          normal({C}, 4),
          normal({B, C}, 5),
          normal({J, C}, 6) * 0.3 + 0.5};
}

Tensors as_list(const ops::LayerNormShiftMixOutput& output) {
  Tensors list{output.sum_BTC, output.last_BC};
  list.insert(list.end(), output.mixed_J.begin(), output.mixed_J.end());
  return list;
}

class LayerNormShiftMix
    : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t, int64_t>> {};

TEST_P(LayerNormShiftMix, MatchesTheDefinition) {
  const auto [B, T, C, J] = GetParam();
  expect_matches(
      [](const Tensors& in) {
        return as_list(ops::layer_norm_shift_mix(in[0], in[1], in[2], in[3], in[4], in[5], 1e-5));
      },
      [](const Tensors& in) {
        return test::reference_layer_norm_shift_mix(
            in[0] + in[1], in[2], in[3], in[4], in[5], 1e-5);
      },
      shift_mix_inputs(B, T, C, J));
}

TEST_P(LayerNormShiftMix, MatchesTheDefinitionWithoutDelta) {
  const auto [B, T, C, J] = GetParam();
  expect_matches(
      [](const Tensors& in) {
        return as_list(ops::layer_norm_shift_mix(in[0], {}, in[2], in[3], in[4], in[5], 1e-5));
      },
      [](const Tensors& in) {
        return test::reference_layer_norm_shift_mix(in[0], in[2], in[3], in[4], in[5], 1e-5);
      },
      shift_mix_inputs(B, T, C, J));
}

// T around the strips of 32 tokens, C around the vectors of 8.
INSTANTIATE_TEST_SUITE_P(Sizes,
                         LayerNormShiftMix,
                         testing::Values(std::tuple{1, 1, 2, 1},
                                         std::tuple{2, 31, 7, 3},
                                         std::tuple{3, 32, 8, 2},
                                         std::tuple{1, 33, 17, 3},
                                         std::tuple{2, 65, 40, 6}),
                         [](const auto& size) {
                           return "B" + std::to_string(std::get<0>(size.param)) + "_T" +
                                  std::to_string(std::get<1>(size.param)) + "_C" +
                                  std::to_string(std::get<2>(size.param)) + "_J" +
                                  std::to_string(std::get<3>(size.param));
                         });

TEST(LayerNormShiftMixState, OneSequenceAndItsPartsGiveTheSameBits) {
  const Tensors in = in_dtype(shift_mix_inputs(2, 70, 24, 2), at::kFloat);
  const auto part = [&](int64_t begin, int64_t end, const at::Tensor& carry) {
    return ops::layer_norm_shift_mix(
        in[0].slice(1, begin, end), in[1].slice(1, begin, end), in[2], in[3], carry, in[5], 1e-5);
  };
  const auto whole = part(0, 70, in[4]);
  const auto first = part(0, 33, in[4]);
  const auto second = part(33, 34, first.last_BC);
  const auto third = part(34, 70, second.last_BC);
  for (size_t j = 0; j < 2; ++j) {
    EXPECT_TRUE(test::same_bits(at::cat({first.mixed_J[j], second.mixed_J[j], third.mixed_J[j]}, 1),
                                whole.mixed_J[j]));
  }
  EXPECT_TRUE(test::same_bits(third.last_BC, whole.last_BC));
}

TEST(LayerNormShiftMixChecks, NameWhatDisagrees) {
  const Tensors good = in_dtype(shift_mix_inputs(2, 3, 4, 2), at::kFloat);
  const auto text = [&](size_t index, const at::Tensor& bad) {
    Tensors in = good;
    in[index] = bad;
    return THROWN_TEXT(c10::Error,
                       ops::layer_norm_shift_mix(in[0], in[1], in[2], in[3], in[4], in[5], 1e-5));
  };
  EXPECT_THAT(text(0, at::zeros({2, 0, 4})), testing::HasSubstr("expected [B, T, C] with T >= 1"));
  EXPECT_THAT(text(0, at::zeros({2, 3, 4}, at::kHalf)), testing::HasSubstr("x_BTC is Half"));
  EXPECT_THAT(text(1, at::zeros({2, 3, 5})),
              testing::HasSubstr("delta_BTC is [2, 3, 5], expected [2, 3, 4]"));
  EXPECT_THAT(text(2, at::zeros({5})), testing::HasSubstr("weight_C is [5], expected [4]"));
  EXPECT_THAT(text(4, at::zeros({1, 4})),
              testing::HasSubstr("carry_BC is [1, 4], expected [2, 4]"));
  EXPECT_THAT(text(5, at::zeros({2, 4}, at::kDouble)),
              testing::HasSubstr("mix_JC is Double but x_BTC is Float"));
}

// ---- gated_residual and relu_squared_ -----------------------------------------------------------

TEST(GatedResidual, MatchesTheDefinition) {
  for (const int64_t size : {1, 7, 40'001}) {
    // Gates from shut to open.
    expect_matches(
        [](const Tensors& in) { return Tensors{ops::gated_residual(in[0], in[1], in[2])}; },
        [](const Tensors& in) { return Tensors{in[0] + in[1].sigmoid() * in[2]}; },
        {normal({size}, 1), normal({size}, 2) * 8, normal({size}, 3)});
  }
}

TEST(GatedResidual, RefusesMismatchedShapes) {
  EXPECT_THAT(
      THROWN_TEXT(c10::Error, ops::gated_residual(at::zeros({2}), at::zeros({3}), at::zeros({2}))),
      testing::HasSubstr("r or y is Float [3] but x is Float [2]"));
}

TEST(ReluSquared, MatchesTheDefinition) {
  for (const int64_t size : {1, 7, 40'001}) {
    // Times one: a leaf cannot be overwritten.
    expect_matches([](const Tensors& in) { return Tensors{ops::relu_squared_(in[0] * 1.0)}; },
                   [](const Tensors& in) { return Tensors{in[0].relu().square()}; },
                   {normal({size}, 1)});
  }
}

TEST(ReluSquared, PassesNanOn) {
  at::Tensor x = at::ones({9});
  x[4] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor h = ops::relu_squared_(x);
  EXPECT_TRUE(h[4].isnan().item<bool>());
  EXPECT_EQ(h.isnan().sum().item<int64_t>(), 1);
}

// ---- cross_entropy ------------------------------------------------------------------------------

at::Tensor targets_below(int64_t vocab_size, int64_t rows) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{9});
  return at::randint(vocab_size, {rows}, generator, at::kLong);
}

TEST(CrossEntropy, MatchesTheDefinition) {
  // Around the blocks of 1024 in which the maximum is searched.
  for (const int64_t vocab_size : {1, 5, 1023, 1025, 3000}) {
    const at::Tensor targets_N = targets_below(vocab_size, 6);
    expect_matches(
        [&](const Tensors& in) { return Tensors{ops::cross_entropy(in[0] * 1.0, targets_N, 0.3)}; },
        [&](const Tensors& in) {
          return Tensors{test::reference_cross_entropy(in[0], targets_N, 0.3)};
        },
        {normal({6, vocab_size}, 1) * 3});
  }
}

TEST(CrossEntropy, IsRightForLargeLogitsAndForTies) {
  const at::Tensor targets_N = at::tensor({2, 0}, at::kLong);
  const at::Tensor logits =
      at::tensor({-1e4, 1e4, 1e4, 500.0, 500.0, 500.0}, at::kFloat).view({2, 3});
  at::Tensor leaf = logits.clone().set_requires_grad(true);
  const at::Tensor losses = ops::cross_entropy(leaf * 1.0, targets_N, 1e-4);
  EXPECT_TRUE(
      test::close_l2(losses, at::tensor({std::log(2.0), std::log(3.0)}, at::kDouble), 1e-6));
  losses.sum().backward();
  // The penalty goes to the first of equals.
  EXPECT_TRUE(test::close_l2(
      leaf.grad(),
      at::tensor({0.0, 0.5 + 1.0, -0.5, -2.0 / 3 + 0.05, 1.0 / 3, 1.0 / 3}, at::kDouble)
          .view({2, 3}),
      1e-6));
}

TEST(CrossEntropy, GivesNanForARowWithNanAlone) {
  at::Tensor logits = normal({3, 20}, 1).to(at::kFloat);
  logits[1][7] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor losses = ops::cross_entropy(logits, targets_below(20, 3), 0);
  EXPECT_TRUE(losses[1].isnan().item<bool>());
  EXPECT_EQ(losses.isnan().sum().item<int64_t>(), 1);
}

TEST(CrossEntropy, NamesATargetOutOfRange) {
  EXPECT_THAT(THROWN_TEXT(c10::Error,
                          ops::cross_entropy(at::zeros({2, 3}), at::tensor({1, 3}, at::kLong), 0)),
              testing::HasSubstr("target 3 of row 1 is not in [0, 3)"));
}

// ---- few_rows_linear ----------------------------------------------------------------------------

TEST(FewRowsLinear, MatchesTheProductInFloat64) {
  const FillEmptyWithNan fill;
  for (const auto& [rows, outputs, inputs] : {std::tuple{1, 1, 1},
                                              std::tuple{1, 130, 768},
                                              std::tuple{2, 3, 17},
                                              std::tuple{4, 201, 40},
                                              std::tuple{3, 70, 7}}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor x = normal({rows, 1, inputs}, 1).to(dtype);
      const at::Tensor weight = normal({outputs, inputs}, 2).to(dtype);
      const at::Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble));
      const at::Tensor y = ops::few_rows_linear(x, weight);
      EXPECT_TRUE(test::close_l2(y, expected, dtype == at::kFloat ? 1e-6 : 1.0 / 256));
      // A row's sums do not depend on the rows beside it.
      EXPECT_TRUE(test::same_bits(ops::few_rows_linear(x[0], weight), y[0]));
    }
  }
}

TEST(FewRowsLinear, RefusesMismatchedShapes) {
  EXPECT_THAT(THROWN_TEXT(c10::Error, ops::few_rows_linear(at::zeros({1, 3}), at::zeros({2, 4}))),
              testing::HasSubstr("x is Float [1, 3] but weight_OI is Float [2, 4]"));
}

// ---- embedding ----------------------------------------------------------------------------------

TEST(Embedding, MatchesTheDefinition) {
  const at::Tensor tokens_BT = targets_below(200, 90).remainder(150).view({2, 45});
  expect_matches([&](const Tensors& in) { return Tensors{ops::embedding(in[0], tokens_BT)}; },
                 [&](const Tensors& in) { return Tensors{in[0].index({tokens_BT})}; },
                 {normal({200, 13}, 1)});
}

TEST(Embedding, AddsAFrequentTokensGradientsInFp32) {
  at::Tensor weight = at::zeros({3, 5}, at::kBFloat16).set_requires_grad(true);
  ops::embedding(weight, at::ones({1, 4096}, at::kLong)).sum().backward();
  // In bf16 a sum of ones ends at 256.
  EXPECT_TRUE(test::same_bits(weight.grad()[1], at::full({5}, 4096, at::kBFloat16)));
  EXPECT_EQ(weight.grad()[0].abs().sum().item<float>(), 0);
}

}  // namespace
}  // namespace rwkv
