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
#include "model/ops/head_loss.h"
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

// Compares with the reference in the three dtypes.
void expect_matches_reference(const Function& op,
                              const Function& reference,
                              const Tensors& inputs) {
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
}

// The same, and compares with itself on one thread.
void expect_matches(const Function& op, const Function& reference, const Tensors& inputs) {
  expect_matches_reference(op, reference, inputs);
  const FillEmptyWithNan fill;
  const Tensors single = in_dtype(inputs, at::kFloat);
  const Tensors actual = values_and_gradients(op, single);
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

// Losses, then the gradient of their sum times `scale`.
Tensors cross_entropy_by_autograd(const at::Tensor& logits_NV,
                                  const at::Tensor& targets_N,
                                  double l2wrap,
                                  double scale) {
  const at::Tensor leaf = logits_NV.detach().clone().set_requires_grad(true);
  const at::Tensor losses_N = test::reference_cross_entropy(leaf, targets_N, l2wrap);
  (losses_N.sum() * scale).backward();
  return {losses_N.detach(), leaf.grad()};
}

// What the op makes of logits between paddings of NaN: losses, and the padded gradient.
Tensors cross_entropy_of_padded(const at::Tensor& logits_NV,
                                const at::Tensor& targets_N,
                                int64_t padding,
                                double l2wrap,
                                double scale) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor logits_NP = at::constant_pad_nd(logits_NV, {0, padding}, nan);
  const int64_t vocab_size = logits_NV.size(1);
  const at::Tensor alone_N = ops::cross_entropy(logits_NP, targets_N, vocab_size);
  const at::Tensor losses_N =
      ops::cross_entropy_gradient_(logits_NP, targets_N, vocab_size, l2wrap, scale);
  EXPECT_TRUE(test::same_bits(alone_N, losses_N));
  return {losses_N, logits_NP};
}

TEST(CrossEntropy, MatchesTheDefinition) {
  const FillEmptyWithNan fill;
  constexpr double kL2Wrap = 0.3, kScale = 0.2;
  // Around the blocks of 1024 in which the maximum is searched.
  for (const int64_t vocab_size : {1, 5, 1023, 1025, 3000}) {
    const at::Tensor targets_N = targets_below(vocab_size, 6);
    const at::Tensor logits_NV = normal({6, vocab_size}, 1) * 3;
    for (const int64_t padding : {0, 1, 11}) {
      for (const at::ScalarType dtype : {at::kDouble, at::kFloat, at::kBFloat16}) {
        const at::Tensor rounded = logits_NV.to(dtype);
        const auto run = [&] {
          return cross_entropy_of_padded(rounded, targets_N, padding, kL2Wrap, kScale);
        };
        const Tensors actual = run();
        const Tensors exact =
            cross_entropy_by_autograd(rounded.to(at::kDouble), targets_N, kL2Wrap, kScale);
        const Tensors plain =
            cross_entropy_by_autograd(rounded.to(dtype == at::kDouble ? at::kDouble : at::kFloat),
                                      targets_N,
                                      kL2Wrap,
                                      kScale);
        const auto allowed = [&](size_t i) {
          // Of a vocabulary of one, all losses are zero, and exactly so.
          const bool is_zero = exact[i].abs().max().item<double>() == 0;
          return is_zero                ? 0
                 : dtype == at::kDouble ? 1e-12
                 : i == 1 && dtype == at::kBFloat16
                     ? 1.0 / 256
                     : 2 * test::relative_l2(plain[i], exact[i]) + 1e-6;
        };
        EXPECT_TRUE(test::close_l2(actual[0], exact[0], allowed(0)))
            << vocab_size << " " << dtype << " losses";
        EXPECT_TRUE(test::close_l2(actual[1].slice(1, 0, vocab_size), exact[1], allowed(1)))
            << vocab_size << " " << dtype << " gradient";
        EXPECT_TRUE(test::same_bits(actual[1].slice(1, vocab_size).contiguous(),
                                    at::zeros({6, padding}, dtype)));
        const int threads = at::get_num_threads();
        at::set_num_threads(1);
        const Tensors again = run();
        at::set_num_threads(threads);
        EXPECT_TRUE(test::same_bits(again[0], actual[0]) && test::same_bits(again[1], actual[1]))
            << vocab_size << " " << dtype << " on one thread";
      }
    }
  }
}

TEST(CrossEntropy, IsRightForLargeLogitsAndForTies) {
  const at::Tensor targets_N = at::tensor({2, 0}, at::kLong);
  const at::Tensor logits_NV =
      at::tensor({-1e4, 1e4, 1e4, 500.0, 500.0, 500.0}, at::kFloat).view({2, 3});
  const at::Tensor losses_N = ops::cross_entropy_gradient_(logits_NV, targets_N, 3, 1e-4, 1);
  EXPECT_TRUE(
      test::close_l2(losses_N, at::tensor({std::log(2.0), std::log(3.0)}, at::kDouble), 1e-6));
  // The penalty goes to the first of equals.
  EXPECT_TRUE(test::close_l2(
      logits_NV,
      at::tensor({0.0, 0.5 + 1.0, -0.5, -2.0 / 3 + 0.05, 1.0 / 3, 1.0 / 3}, at::kDouble)
          .view({2, 3}),
      1e-6));
}

TEST(CrossEntropy, GivesNanForARowWithNanAlone) {
  at::Tensor logits_NV = normal({3, 20}, 1).to(at::kFloat);
  logits_NV[1][7] = std::numeric_limits<float>::quiet_NaN();
  for (const auto& losses_N :
       {ops::cross_entropy(logits_NV, targets_below(20, 3), 20),
        ops::cross_entropy_gradient_(logits_NV, targets_below(20, 3), 20, 0, 1)}) {
    EXPECT_TRUE(losses_N[1].isnan().item<bool>());
    EXPECT_EQ(losses_N.isnan().sum().item<int64_t>(), 1);
  }
}

TEST(CrossEntropy, NamesWhatDoesNotFit) {
  const at::Tensor logits_NP = at::zeros({2, 4});
  const auto text = [&](const at::Tensor& targets_N, int64_t vocab_size) {
    const std::string alone =
        THROWN_TEXT(c10::Error, ops::cross_entropy(logits_NP, targets_N, vocab_size));
    const std::string with_gradient = THROWN_TEXT(
        c10::Error, ops::cross_entropy_gradient_(logits_NP, targets_N, vocab_size, 0, 1));
    EXPECT_EQ(alone.substr(0, alone.find('\n')), with_gradient.substr(0, with_gradient.find('\n')));
    return alone;
  };
  EXPECT_THAT(text(at::tensor({1, 3}, at::kLong), 3),
              testing::HasSubstr("target 3 of row 1 is not in [0, 3)"));
  EXPECT_THAT(text(at::tensor({1, 3}, at::kLong), 5),
              testing::HasSubstr("logits_NP is [2, 4], expected [N, P] with N >= 1 and P >= "
                                 "vocab_size = 5"));
  EXPECT_THAT(text(at::tensor({1}, at::kLong), 3),
              testing::HasSubstr("targets_N is Long [1], expected Long [2]"));
}

// ---- head_loss ----------------------------------------------------------------------------------

struct HeadLossSplit {
  std::optional<int64_t> rows_per_chunk;
  std::optional<int64_t> vocab_multiple;
};

class HeadLoss : public testing::TestWithParam<HeadLossSplit> {};

TEST_P(HeadLoss, MatchesTheDefinition) {
  const HeadLossSplit split = GetParam();
  const at::Tensor targets_N = targets_below(37, 10);
  const ops::HeadLossSettings settings{.l2wrap = 0.3,
                                       .rows_per_chunk = split.rows_per_chunk,
                                       .vocab_multiple = split.vocab_multiple};
  const Function op = [&](const Tensors& in) {
    return Tensors{ops::head_loss(in[0], in[1], targets_N, settings)};
  };
  const Tensors inputs{normal({10, 24}, 1), normal({37, 24}, 2) * 0.3};
  expect_matches_reference(
      op,
      [&](const Tensors& in) {
        const at::Tensor logits_NV = at::linear(in[0], in[1]);
        return Tensors{test::reference_cross_entropy(logits_NV, targets_N, 0.3).mean()};
      },
      inputs);
  // On the same number of threads, which the library's matrix products see.
  const Tensors single = in_dtype(inputs, at::kFloat);
  const Tensors first = values_and_gradients(op, single), second = values_and_gradients(op, single);
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(test::same_bits(first[i], second[i])) << "result " << i << " again";
  }
}

INSTANTIATE_TEST_SUITE_P(Splits,
                         HeadLoss,
                         testing::Values(HeadLossSplit{},
                                         HeadLossSplit{10, 8},
                                         HeadLossSplit{1, 1},
                                         HeadLossSplit{3, 64},
                                         HeadLossSplit{5, 37},
                                         HeadLossSplit{9, 2},
                                         HeadLossSplit{1000, 1}),
                         [](const auto& split) {
                           return "Rows" + std::to_string(split.param.rows_per_chunk.value_or(0)) +
                                  "_Multiple" +
                                  std::to_string(split.param.vocab_multiple.value_or(0));
                         });

struct HeadLossResult {
  at::Tensor loss, dhidden_NC, dweight_VC;
};

HeadLossResult head_loss_where_trained(bool hidden, bool weight) {
  const at::Tensor hidden_NC = normal({10, 24}, 1).to(at::kBFloat16).set_requires_grad(hidden);
  const at::Tensor weight_VC = normal({37, 24}, 2).to(at::kBFloat16).set_requires_grad(weight);
  const at::Tensor loss = ops::head_loss(
      hidden_NC, weight_VC, targets_below(37, 10), {.l2wrap = 1e-4, .rows_per_chunk = 4});
  if (loss.requires_grad()) {
    loss.backward();
  }
  return {loss.detach(), hidden_NC.grad(), weight_VC.grad()};
}

TEST(HeadLossGradients, AreThoseThatAreNeeded) {
  const HeadLossResult both = head_loss_where_trained(true, true);
  const HeadLossResult hidden = head_loss_where_trained(true, false);
  const HeadLossResult weight = head_loss_where_trained(false, true);
  const HeadLossResult neither = head_loss_where_trained(false, false);
  EXPECT_TRUE(test::same_bits(hidden.dhidden_NC, both.dhidden_NC));
  EXPECT_FALSE(hidden.dweight_VC.defined());
  EXPECT_TRUE(test::same_bits(weight.dweight_VC, both.dweight_VC));
  EXPECT_FALSE(weight.dhidden_NC.defined());
  for (const at::Tensor& loss : {hidden.loss, weight.loss, neither.loss}) {
    EXPECT_TRUE(test::same_bits(loss, both.loss));
  }
}

TEST(HeadLossGradients, OfAThirdAreNotRoundedToAThirdInBf16) {
  const at::Tensor hidden_NC = normal({10, 24}, 1).to(at::kBFloat16);
  const auto gradient_of = [&](double share) {
    const at::Tensor weight_VC = normal({37, 24}, 2).to(at::kBFloat16).set_requires_grad(true);
    (ops::head_loss(hidden_NC, weight_VC, targets_below(37, 10), {}) * share).backward();
    return weight_VC.grad().to(at::kDouble);
  };
  // A third in bf16 is off by 1/512 of itself. The mean shows it; single elements are rounded.
  const at::Tensor whole = gradient_of(1), third = gradient_of(1.0 / 3);
  const double mean_ratio = (third.abs().sum() / whole.abs().sum()).item<double>();
  EXPECT_NEAR(mean_ratio * 3, 1, 2e-4);
}

TEST(HeadLossGradients, AreScaledOnce) {
  const at::Tensor weight_VC = normal({37, 24}, 2).set_requires_grad(true);
  const at::Tensor loss = ops::head_loss(normal({10, 24}, 1), weight_VC, targets_below(37, 10), {});
  const at::Tensor half = at::full({}, 0.5, at::kDouble);
  loss.backward(half, /*retain_graph=*/true);
  EXPECT_THAT(THROWN_TEXT(c10::Error, loss.backward(half)),
              testing::HasSubstr("modified by an inplace operation"));
}

TEST(HeadLoss, NamesWhatDoesNotFit) {
  const at::Tensor hidden_NC = at::zeros({2, 3});
  const at::Tensor weight_VC = at::zeros({5, 3});
  const at::Tensor targets_N = at::tensor({1, 4}, at::kLong);
  const auto text = [&](const at::Tensor& hidden,
                        const at::Tensor& weight,
                        const at::Tensor& targets,
                        const ops::HeadLossSettings& settings = {}) {
    return THROWN_TEXT(c10::Error, ops::head_loss(hidden, weight, targets, settings));
  };
  EXPECT_THAT(text(at::zeros({0, 3}), weight_VC, targets_N),
              testing::HasSubstr("hidden_NC is [0, 3], expected [N, C] with N >= 1"));
  EXPECT_THAT(text(hidden_NC.to(at::kHalf), weight_VC, targets_N),
              testing::HasSubstr("hidden_NC is Half, expected bfloat16, float or double"));
  EXPECT_THAT(text(hidden_NC, at::zeros({5, 4}), targets_N),
              testing::HasSubstr("weight_VC is Float [5, 4] but hidden_NC is Float [2, 3]"));
  EXPECT_THAT(text(hidden_NC, weight_VC, targets_N.slice(0, 0, 1)),
              testing::HasSubstr("targets_N is Long [1], expected Long [2]"));
  // The row is that of the whole, whatever the chunk.
  EXPECT_THAT(text(hidden_NC, weight_VC, targets_N + 1, {.rows_per_chunk = 1}),
              testing::HasSubstr("target 5 of row 1 is not in [0, 5)"));
  EXPECT_THAT(text(hidden_NC, weight_VC, targets_N, {.rows_per_chunk = 0}),
              testing::HasSubstr("rows_per_chunk is 0 and vocab_multiple 1, expected at least 1"));
}

// ---- few_rows_linear ----------------------------------------------------------------------------

TEST(FewRowsLinear, MatchesTheProductInFloat64) {
  const FillEmptyWithNan fill;
  for (const auto& [rows, outputs, inputs] : {std::tuple{1, 1, 1},
                                              std::tuple{1, 130, 768},
                                              std::tuple{2, 3, 17},
                                              std::tuple{4, 201, 40},
                                              std::tuple{2, 768, 130},
                                              std::tuple{3, 70, 7}}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor x = normal({rows, 1, inputs}, 1).to(dtype);
      const at::Tensor matrix = normal({outputs, inputs}, 2).to(dtype);
      const at::Tensor expected = at::linear(x.to(at::kDouble), matrix.to(at::kDouble));
      for (const at::Tensor& weight : {matrix, matrix.t().contiguous().t()}) {
        const at::Tensor y = ops::few_rows_linear(x, weight);
        EXPECT_TRUE(test::close_l2(y, expected, dtype == at::kFloat ? 1e-6 : 1.0 / 256));
        // A row's sums do not depend on the rows beside it.
        EXPECT_TRUE(test::same_bits(ops::few_rows_linear(x[0], weight), y[0]));
      }
      // Of no layout that is read as it is.
      const at::Tensor spaced = at::stack({matrix, matrix}, 2).select(2, 0);
      EXPECT_TRUE(
          test::same_bits(ops::few_rows_linear(x, spaced), ops::few_rows_linear(x, matrix)));
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
