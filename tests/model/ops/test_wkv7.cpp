#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/ops/wkv7.h"
#include "tests/support/reference_ops.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

// r, w_raw, k, v, a, b [B, T, C]; then w0 [C] and the state [B, H, N, N].
constexpr size_t kNumInputs = 8;
constexpr size_t kNumOfTokens = 6;
constexpr size_t kState = 7;

struct Case {
  std::array<at::Tensor, kNumInputs> inputs;
  at::Tensor dy_BTC, dstate_BHNN;
};

// y, the state, then the gradient of each input.
using Results = std::array<at::Tensor, 2 + kNumInputs>;
constexpr const char* kNames[] = {
    "y", "state", "dr", "dw_raw", "dk", "dv", "da", "db", "dw0", "dstate"};
bool has_activations_dtype(size_t result) {
  return result == 0 || (result >= 2 && result < 2 + kNumOfTokens);
}

struct Size {
  int64_t B, T, H, N;
};

Case random_case(const Size& size) {
  const auto [B, T, H, N] = size;
  at::Generator generator =
      at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(B + 10 * T + 1000 * H + N));
  const auto normal = [&](at::IntArrayRef shape) {
    return at::randn(shape, generator, at::kDouble);
  };
  const at::Tensor key = normal({B, T, H, N});
  const at::Tensor kk = (key / key.norm(2, {3}, true)).view({B, T, H * N});
  return {.inputs = {normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     -kk,
                     kk * normal({B, T, H * N}).sigmoid(),
                     normal({H * N}) * 2 - 1,
                     normal({B, H, N, N})},
          .dy_BTC = normal({B, T, H * N}),
          .dstate_BHNN = normal({B, H, N, N})};
}

Case cast(const Case& given, at::ScalarType activations, at::ScalarType exact) {
  Case result = given;
  for (size_t i = 0; i < kNumInputs; ++i) {
    result.inputs[i] = given.inputs[i].to(i < kNumOfTokens ? activations : exact);
  }
  result.dy_BTC = given.dy_BTC.to(activations);
  result.dstate_BHNN = given.dstate_BHNN.to(exact);
  return result;
}

std::array<at::Tensor, kNumInputs> leaves(const Case& given) {
  std::array<at::Tensor, kNumInputs> result;
  for (size_t i = 0; i < kNumInputs; ++i) {
    result[i] = given.inputs[i].detach().clone().set_requires_grad(true);
  }
  return result;
}

// Backward of sum(y dy) + sum(final state dstate).
Results results_of(const at::Tensor& y,
                   const at::Tensor& state,
                   const Case& given,
                   const std::array<at::Tensor, kNumInputs>& in) {
  const at::ScalarType exact = state.scalar_type();
  ((y.to(exact) * given.dy_BTC.to(exact)).sum() + (state * given.dstate_BHNN).sum()).backward();
  Results results;
  results[0] = y.detach();
  results[1] = state.detach();
  for (size_t i = 0; i < kNumInputs; ++i) {
    results[2 + i] = in[i].grad();
  }
  return results;
}

Results run(const Case& given, const at::Tensor& starts_BT = {}) {
  const auto in = leaves(given);
  const ops::Wkv7Output out =
      ops::wkv7({in[0], in[1], in[2], in[3], in[4], in[5]}, in[6], in[7], starts_BT);
  return results_of(out.y_BTC, out.state_BHNN, given, in);
}

// Torch's autograd of the definition, document by document.
Results run_reference(const Case& rounded, at::ScalarType dtype, const at::Tensor& starts_BT = {}) {
  const Case given = cast(rounded, dtype, dtype);
  const auto in = leaves(given);
  const int64_t B = given.dy_BTC.size(0), T = given.dy_BTC.size(1);
  const at::Tensor decay = (-std::exp(-0.5) * (in[6] + in[1]).sigmoid()).exp();
  std::vector<at::Tensor> rows, states;
  for (int64_t row = 0; row < B; ++row) {
    const auto is_start = [&](int64_t t) {
      return starts_BT.defined() && starts_BT[row][t].item<bool>();
    };
    const auto of_row = [&](const at::Tensor& x) { return x.slice(0, row, row + 1); };
    at::Tensor state = of_row(in[kState]);
    std::vector<at::Tensor> documents;
    for (int64_t begin = 0, end = 0; begin < T; begin = end) {
      for (end = begin + 1; end < T && !is_start(end);) {
        ++end;
      }
      const auto part = [&](const at::Tensor& x) { return of_row(x).slice(1, begin, end); };
      const test::ReferenceWkv7 out =
          test::reference_wkv7(part(in[0]),
                               part(decay),
                               part(in[2]),
                               part(in[3]),
                               part(in[4]),
                               part(in[5]),
                               is_start(begin) ? at::zeros_like(state) : state);
      documents.push_back(out.y_BTC);
      state = out.state_BHNN;
    }
    rows.push_back(at::cat(documents, 1));
    states.push_back(state);
  }
  return results_of(at::cat(rows), at::cat(states), given, in);
}

// In three precisions: fp32 may have twice the error of the definition in fp32 and what going back
// eight steps adds, a bf16 result is rounded once, by at most 2^-8 of itself.
void expect_the_definition(const Case& given, const at::Tensor& starts_BT, double going_back) {
  const auto expect_close = [&](const Case& rounded, double exact) {
    const Results actual = run(rounded, starts_BT);
    const Results expected = run_reference(rounded, at::kDouble, starts_BT);
    const Results plain = run_reference(rounded, exact > 0 ? at::kDouble : at::kFloat, starts_BT);
    for (size_t i = 0; i < actual.size(); ++i) {
      const double allowed =
          actual[i].scalar_type() == at::kBFloat16
              ? 1.0 / 256
              : 2 * test::relative_l2(plain[i], expected[i]) + (exact > 0 ? exact : going_back);
      EXPECT_TRUE(test::close_l2(actual[i], expected[i], allowed))
          << kNames[i] << " of " << rounded.dy_BTC.scalar_type();
      EXPECT_EQ(actual[i].scalar_type(),
                has_activations_dtype(i) ? rounded.dy_BTC.scalar_type()
                                         : rounded.dstate_BHNN.scalar_type());
    }
  };
  expect_close(given, 1e-12);
  expect_close(cast(given, at::kFloat, at::kFloat), 0);
  expect_close(cast(given, at::kBFloat16, at::kFloat), 0);
}

class Wkv7 : public testing::TestWithParam<Size> {};

TEST_P(Wkv7, MatchesTheDefinition) {
  expect_the_definition(random_case(GetParam()), {}, 2e-6);
}

INSTANTIATE_TEST_SUITE_P(Sizes,
                         Wkv7,
                         testing::Values(Size{1, 1, 1, 1},
                                         Size{2, 1, 2, 64},
                                         Size{3, 7, 2, 5},
                                         Size{1, 8, 3, 16},
                                         Size{2, 17, 2, 32},
                                         Size{1, 63, 1, 8},
                                         Size{2, 64, 1, 64},
                                         Size{2, 65, 2, 24},
                                         Size{1, 131, 1, 128},
                                         Size{1, 257, 3, 33}),
                         [](const auto& named) {
                           const Size& size = named.param;
                           return "B" + std::to_string(size.B) + "_T" + std::to_string(size.T) +
                                  "_H" + std::to_string(size.H) + "_N" + std::to_string(size.N);
                         });

// A state that forgets nothing under one key, over and over; and one that forgets as fast as it
// can, so that going back divides by the smallest decay.
TEST(Wkv7Extremes, OneKeyAndNoDecay) {
  Case given = random_case({2, 200, 1, 64});
  given.inputs[4] = given.inputs[4].select(1, 0).unsqueeze(1).expand({2, 200, 64}).contiguous();
  given.inputs[5] = -given.inputs[4] * 0.99;
  given.inputs[6].fill_(-12);
  expect_the_definition(given, {}, 3e-6);
}
TEST(Wkv7Extremes, AllForgetting) {
  Case given = random_case({1, 200, 2, 64});
  given.inputs[6].fill_(8);
  // 2^-24 times the 128 of the header, in what is small beside the state it is taken off.
  expect_the_definition(given, {}, 1e-5);
}

TEST(Wkv7Gradient, IsThatOfFiniteDifferences) {
  const Case given = random_case({1, 9, 2, 3});
  const Results actual = run(given);
  const auto value_of = [&](const Case& at) {
    const auto& in = at.inputs;
    const ops::Wkv7Output out = ops::wkv7({in[0], in[1], in[2], in[3], in[4], in[5]}, in[6], in[7]);
    return ((out.y_BTC * at.dy_BTC).sum() + (out.state_BHNN * at.dstate_BHNN).sum()).item<double>();
  };
  constexpr double kStep = 1e-6;
  for (size_t i = 0; i < kNumInputs; ++i) {
    for (int64_t element = 0; element < given.inputs[i].numel(); element += 5) {
      Case shifted = given;
      shifted.inputs[i] = given.inputs[i].clone();
      shifted.inputs[i].view({-1})[element] += kStep;
      const double above = value_of(shifted);
      shifted.inputs[i].view({-1})[element] -= 2 * kStep;
      const double slope = (above - value_of(shifted)) / (2 * kStep);
      EXPECT_NEAR(actual[2 + i].view({-1})[element].item<double>(), slope, 1e-7)
          << kNames[2 + i] << " " << element;
    }
  }
}

TEST(Wkv7State, HandedOverIsOneSequence) {
  const Case given = cast(random_case({2, 100, 2, 16}), at::kFloat, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto part = [&](int64_t begin, int64_t end, const at::Tensor& state) {
    const auto of = [&](size_t i) { return given.inputs[i].slice(1, begin, end); };
    return ops::wkv7({of(0), of(1), of(2), of(3), of(4), of(5)}, given.inputs[6], state);
  };
  const auto whole = part(0, 100, given.inputs[kState]);
  const auto first = part(0, 37, given.inputs[kState]);
  const auto nothing = part(37, 37, first.state_BHNN);
  const auto second = part(37, 100, nothing.state_BHNN);
  EXPECT_TRUE(test::same_bits(at::cat({first.y_BTC, second.y_BTC}, 1), whole.y_BTC));
  EXPECT_TRUE(test::same_bits(second.state_BHNN, whole.state_BHNN));
}

TEST(Wkv7Starts, MatchTheDefinitionDocumentByDocument) {
  const Case given = random_case({4, 130, 2, 16});
  const at::Tensor starts_BT = at::zeros({4, 130}, at::kBool);
  for (const int64_t t : {0, 64, 128}) {
    starts_BT[0][t] = true;
  }
  for (const int64_t t : {1, 8, 63, 65, 127, 129}) {
    starts_BT[1][t] = true;
  }
  starts_BT[2].fill_(true);
  expect_the_definition(given, starts_BT, 2e-6);
}

TEST(Wkv7Starts, NowhereGiveTheBitsOfNone) {
  const Case given = cast(random_case({2, 70, 2, 19}), at::kFloat, at::kFloat);
  const Results nowhere = run(given, at::zeros({2, 70}, at::kBool)), none = run(given);
  for (size_t i = 0; i < none.size(); ++i) {
    EXPECT_TRUE(test::same_bits(nowhere[i], none[i])) << kNames[i];
  }
}

TEST(Wkv7Starts, KeepANanInItsDocument) {
  Case given = cast(random_case({1, 9, 1, 8}), at::kFloat, at::kFloat);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  given.inputs[kState].fill_(nan);
  given.inputs[2][0][4].fill_(nan);
  at::Tensor starts_BT = at::zeros({1, 9}, at::kBool);
  for (const int64_t t : {0, 3, 6}) {
    starts_BT[0][t] = true;
  }
  const Results results = run(given, starts_BT);
  for (size_t i = 0; i < 2 + kNumOfTokens; ++i) {
    if (i == 1) {
      continue;
    }
    const at::Tensor is_nan_T = results[i].isnan().any(2)[0];
    for (const int64_t t : {0, 1, 2, 6, 7, 8}) {
      EXPECT_FALSE(is_nan_T[t].item<bool>()) << kNames[i] << ", token " << t;
    }
  }
  EXPECT_TRUE(results[0].isnan().any(2)[0][4].item<bool>());
  EXPECT_FALSE(results[1].isnan().any().item<bool>());
  EXPECT_EQ(results[9].abs().max().item<float>(), 0);
}

TEST(Wkv7Threads, DoNotChangeABit) {
  const Case given = cast(random_case({3, 90, 5, 16}), at::kFloat, at::kFloat);
  const int threads = at::get_num_threads();
  at::set_num_threads(1);
  const Results alone = run(given);
  at::set_num_threads(3);
  const Results together = run(given);
  at::set_num_threads(threads);
  for (size_t i = 0; i < alone.size(); ++i) {
    EXPECT_TRUE(test::same_bits(alone[i], together[i])) << kNames[i];
  }
}

TEST(Wkv7Errors, NameWhatDisagrees) {
  const Case given = cast(random_case({2, 3, 2, 4}), at::kFloat, at::kFloat);
  const auto& in = given.inputs;
  const auto text = [&](const ops::Wkv7Inputs& inputs,
                        const at::Tensor& w0,
                        const at::Tensor& state,
                        const at::Tensor& starts = {}) {
    return THROWN_TEXT(c10::Error, ops::wkv7(inputs, w0, state, starts));
  };
  const ops::Wkv7Inputs right{in[0], in[1], in[2], in[3], in[4], in[5]};
  ops::Wkv7Inputs wrong = right;
  wrong.k_BTC = in[2].slice(1, 0, 2);
  EXPECT_THAT(text(wrong, in[6], in[7]),
              testing::HasSubstr("k_BTC is Float [2, 2, 8] but r_BTC is Float [2, 3, 8]"));
  EXPECT_THAT(text(right, in[6].to(at::kDouble), in[7]),
              testing::HasSubstr("w0_C is Double [8], expected Float [8]"));
  EXPECT_THAT(text(right, in[6], in[7].slice(3, 0, 2)),
              testing::HasSubstr("expected Float [2, H, N, N] with H N = 8"));
  EXPECT_THAT(text(right, in[6], in[7], at::zeros({2, 3})),
              testing::HasSubstr("starts_BT is Float [2, 3], expected Bool [B, T]"));
  wrong = right;
  wrong.r_BTC = in[0].to(at::kHalf);
  EXPECT_THAT(text(wrong, in[6], in[7]),
              testing::HasSubstr("r_BTC is Half [2, 3, 8], expected [B, T, C] of bfloat16"));
}

}  // namespace
}  // namespace rwkv
