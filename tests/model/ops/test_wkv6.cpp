#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/ops/wkv6.h"
#include "tests/support/reference_ops.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

// r, w_raw, k, v [B, T, C]; then w0 and u [C] and the state [B, H, N, N].
constexpr size_t kNumInputs = 7;
constexpr size_t kNumOfTokens = 4;
constexpr size_t kWRaw = 1;
constexpr size_t kW0 = 4;
constexpr size_t kState = 6;

struct Case {
  std::array<at::Tensor, kNumInputs> inputs;  // w_raw may be undefined
  at::Tensor dy_BTC, dstate_BHNN;
};

// y, the state, then the gradient of each input.
using Results = std::array<at::Tensor, 2 + kNumInputs>;
constexpr const char* kNames[] = {"y", "state", "dr", "dw_raw", "dk", "dv", "dw0", "du", "dstate"};
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
  return {.inputs = {normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     normal({B, T, H * N}),
                     normal({H * N}) * 2 - 1,
                     normal({H * N}),
                     normal({B, H, N, N})},
          .dy_BTC = normal({B, T, H * N}),
          .dstate_BHNN = normal({B, H, N, N})};
}

Case cast(const Case& given, at::ScalarType activations, at::ScalarType exact) {
  Case result = given;
  for (size_t i = 0; i < kNumInputs; ++i) {
    if (given.inputs[i].defined()) {
      result.inputs[i] = given.inputs[i].to(i < kNumOfTokens ? activations : exact);
    }
  }
  result.dy_BTC = given.dy_BTC.to(activations);
  result.dstate_BHNN = given.dstate_BHNN.to(exact);
  return result;
}

std::array<at::Tensor, kNumInputs> leaves(const Case& given) {
  std::array<at::Tensor, kNumInputs> result;
  for (size_t i = 0; i < kNumInputs; ++i) {
    if (given.inputs[i].defined()) {
      result[i] = given.inputs[i].detach().clone().set_requires_grad(true);
    }
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
    results[2 + i] = in[i].defined() ? in[i].grad() : at::Tensor();
  }
  return results;
}

Results run(const Case& given, const at::Tensor& starts_BT = {}) {
  const auto in = leaves(given);
  const ops::Wkv6Output out =
      ops::wkv6({in[0], in[1], in[2], in[3]}, in[4], in[5], in[kState], starts_BT);
  return results_of(out.y_BTC, out.state_BHNN, given, in);
}

// Torch's autograd of the definition, document by document.
Results run_reference(const Case& rounded, at::ScalarType dtype, const at::Tensor& starts_BT = {}) {
  const Case given = cast(rounded, dtype, dtype);
  const auto in = leaves(given);
  const int64_t B = given.dy_BTC.size(0), T = given.dy_BTC.size(1);
  const at::Tensor w_raw = in[kWRaw].defined() ? in[kWRaw] : at::zeros_like(in[0]);
  const at::Tensor decay = (-(in[kW0] + w_raw).exp()).exp();
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
      const test::ReferenceWkv6 out =
          test::reference_wkv6(part(in[0]),
                               part(decay),
                               part(in[2]),
                               part(in[3]),
                               in[5],
                               is_start(begin) ? at::zeros_like(state) : state);
      documents.push_back(out.y_BTC);
      state = out.state_BHNN;
    }
    rows.push_back(at::cat(documents, 1));
    states.push_back(state);
  }
  return results_of(at::cat(rows), at::cat(states), given, in);
}

// In three precisions: fp32 may have twice the error of the definition in fp32 and two roundings, a
// bf16 result is rounded once, by at most 2^-8 of itself.
void expect_the_definition(const Case& given, const at::Tensor& starts_BT = {}) {
  const auto expect_close = [&](const Case& rounded, double exact) {
    const Results actual = run(rounded, starts_BT);
    const Results expected = run_reference(rounded, at::kDouble, starts_BT);
    const Results plain = run_reference(rounded, exact > 0 ? at::kDouble : at::kFloat, starts_BT);
    for (size_t i = 0; i < actual.size(); ++i) {
      if (!expected[i].defined()) {
        EXPECT_FALSE(actual[i].defined());
        continue;
      }
      if (expected[i].abs().max().item<double>() == 0) {
        EXPECT_EQ(actual[i].abs().max().item<double>(), 0) << kNames[i];
        continue;
      }
      const double allowed =
          actual[i].scalar_type() == at::kBFloat16
              ? 1.0 / 256
              : 2 * test::relative_l2(plain[i], expected[i]) + (exact > 0 ? exact : 1.2e-7);
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

class Wkv6 : public testing::TestWithParam<Size> {};

TEST_P(Wkv6, MatchesTheDefinition) {
  expect_the_definition(random_case(GetParam()));
}
TEST_P(Wkv6, WithOneDecayForAllTokensMatchesTheDefinition) {
  Case given = random_case(GetParam());
  given.inputs[kWRaw] = at::Tensor();
  expect_the_definition(given);
}

INSTANTIATE_TEST_SUITE_P(Sizes,
                         Wkv6,
                         testing::Values(Size{1, 1, 1, 1},
                                         Size{2, 1, 2, 64},
                                         Size{3, 7, 2, 5},
                                         Size{1, 15, 3, 16},
                                         Size{2, 17, 2, 32},
                                         Size{1, 63, 1, 8},
                                         Size{2, 16, 1, 64},
                                         Size{2, 33, 2, 24},
                                         Size{1, 131, 1, 128},
                                         Size{1, 161, 3, 33}),
                         [](const auto& named) {
                           const Size& size = named.param;
                           return "B" + std::to_string(size.B) + "_T" + std::to_string(size.T) +
                                  "_H" + std::to_string(size.H) + "_N" + std::to_string(size.N);
                         });

// A state that forgets all at every token, of which no division finds the one before; and one that
// forgets nothing.
TEST(Wkv6Extremes, AllForgetting) {
  Case given = random_case({2, 70, 2, 64});
  given.inputs[kWRaw].zero_();
  for (const double w0 : {3.0, 8.0}) {
    given.inputs[kW0].fill_(w0);
    expect_the_definition(given);
  }
}
TEST(Wkv6Extremes, NothingForgotten) {
  Case given = random_case({1, 70, 2, 64});
  given.inputs[kW0].fill_(-30);
  expect_the_definition(given);
}
// The definition has infinities there; the op has the limit.
TEST(Wkv6Extremes, BeyondTheExponentialsAreFinite) {
  Case given = cast(random_case({1, 20, 1, 8}), at::kFloat, at::kFloat);
  given.inputs[kWRaw].fill_(500);
  const Results results = run(given);
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_TRUE(results[i].isfinite().all().item<bool>()) << kNames[i];
  }
  EXPECT_EQ(results[3].abs().max().item<float>(), 0);
  given.inputs[kW0][3] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(run(given)[0].isnan().any().item<bool>());
}

TEST(Wkv6Gradient, IsThatOfFiniteDifferences) {
  const Case given = random_case({1, 19, 2, 3});
  const Results actual = run(given);
  const auto value_of = [&](const Case& at) {
    const auto& in = at.inputs;
    const ops::Wkv6Output out = ops::wkv6({in[0], in[1], in[2], in[3]}, in[4], in[5], in[kState]);
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

TEST(Wkv6State, HandedOverIsOneSequence) {
  const Case given = cast(random_case({2, 100, 2, 16}), at::kFloat, at::kFloat);
  const at::NoGradGuard no_grad;
  const auto part = [&](int64_t begin, int64_t end, const at::Tensor& state) {
    const auto of = [&](size_t i) { return given.inputs[i].slice(1, begin, end); };
    return ops::wkv6({of(0), of(1), of(2), of(3)}, given.inputs[4], given.inputs[5], state);
  };
  const auto whole = part(0, 100, given.inputs[kState]);
  const auto first = part(0, 37, given.inputs[kState]);
  const auto nothing = part(37, 37, first.state_BHNN);
  const auto second = part(37, 100, nothing.state_BHNN);
  EXPECT_TRUE(test::same_bits(at::cat({first.y_BTC, second.y_BTC}, 1), whole.y_BTC));
  EXPECT_TRUE(test::same_bits(second.state_BHNN, whole.state_BHNN));
}

TEST(Wkv6Starts, MatchTheDefinitionDocumentByDocument) {
  const Case given = random_case({4, 50, 2, 16});
  const at::Tensor starts_BT = at::zeros({4, 50}, at::kBool);
  for (const int64_t t : {0, 16, 32}) {
    starts_BT[0][t] = true;
  }
  for (const int64_t t : {1, 8, 15, 17, 31, 49}) {
    starts_BT[1][t] = true;
  }
  starts_BT[2].fill_(true);
  expect_the_definition(given, starts_BT);
}

TEST(Wkv6Starts, NowhereGiveTheBitsOfNone) {
  const Case given = cast(random_case({2, 70, 2, 19}), at::kFloat, at::kFloat);
  const Results nowhere = run(given, at::zeros({2, 70}, at::kBool)), none = run(given);
  for (size_t i = 0; i < none.size(); ++i) {
    EXPECT_TRUE(test::same_bits(nowhere[i], none[i])) << kNames[i];
  }
}

TEST(Wkv6Starts, KeepANanInItsDocument) {
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
  EXPECT_EQ(results[8].abs().max().item<float>(), 0);
}

TEST(Wkv6Threads, DoNotChangeABit) {
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

TEST(Wkv6Errors, NameWhatDisagrees) {
  const Case given = cast(random_case({2, 3, 2, 4}), at::kFloat, at::kFloat);
  const auto& in = given.inputs;
  const auto text = [&](const ops::Wkv6Inputs& inputs,
                        const at::Tensor& u,
                        const at::Tensor& state,
                        const at::Tensor& starts = {}) {
    return THROWN_TEXT(c10::Error, ops::wkv6(inputs, in[4], u, state, starts));
  };
  const ops::Wkv6Inputs right{in[0], in[1], in[2], in[3]};
  ops::Wkv6Inputs wrong = right;
  wrong.w_raw_BTC = in[1].slice(1, 0, 2);
  EXPECT_THAT(text(wrong, in[5], in[6]),
              testing::HasSubstr("w_raw_BTC is Float [2, 2, 8] but r_BTC is Float [2, 3, 8]"));
  EXPECT_THAT(text(right, in[5].to(at::kDouble), in[6]),
              testing::HasSubstr("u_C is Double [8], expected Float [8]"));
  EXPECT_THAT(text(right, in[5], in[6].slice(3, 0, 2)),
              testing::HasSubstr("expected Float [2, H, N, N] with H N = 8"));
  EXPECT_THAT(text(right, in[5], in[6], at::zeros({2, 3})),
              testing::HasSubstr("starts_BT is Float [2, 3], expected Bool [B, T]"));
  wrong = right;
  wrong.r_BTC = in[0].to(at::kHalf);
  EXPECT_THAT(text(wrong, in[5], in[6]),
              testing::HasSubstr("r_BTC is Half [2, 3, 8], expected [B, T, C] of bfloat16"));
}

}  // namespace
}  // namespace rwkv
