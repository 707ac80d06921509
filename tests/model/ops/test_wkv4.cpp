#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/ops/wkv4.h"
#include "tests/support/reference_ops.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

struct Inputs {
  at::Tensor w_log_A, k_BTA, v_BTA, u_A, state_B3A, dy_BTA, dstate_B3A;
};

struct Results {
  at::Tensor y_BTA, state_B3A, dw_log_A, dk_BTA, dv_BTA, du_A, dstate_B3A;
};

at::Tensor leaf(const at::Tensor& tensor) {
  return tensor.detach().clone().set_requires_grad(true);
}

// Forward, then backward of sum(y dy) + sum(final state dstate).
Results run(const Inputs& inputs) {
  const at::Tensor w = leaf(inputs.w_log_A), k = leaf(inputs.k_BTA), v = leaf(inputs.v_BTA),
                   u = leaf(inputs.u_A), state = leaf(inputs.state_B3A);
  const ops::Wkv4Output out = ops::wkv4(w, k, v, u, state);
  const at::Tensor target = (out.y_BTA * inputs.dy_BTA).sum().to(out.state_B3A.scalar_type()) +
                            (out.state_B3A * inputs.dstate_B3A).sum();
  target.backward();
  return {out.y_BTA.detach(),
          out.state_B3A.detach(),
          w.grad(),
          k.grad(),
          v.grad(),
          u.grad(),
          state.grad()};
}

Inputs random_inputs(int64_t B, int64_t T, int64_t A, double k_size) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(17 + B * 1000 + T * 10 + A);
  const auto normal = [&](at::IntArrayRef shape) {
    return at::randn(shape, generator, at::kDouble);
  };
  Inputs inputs{.w_log_A = -(normal({A}) * 1.5).exp(),
                .k_BTA = normal({B, T, A}) * k_size,
                .v_BTA = normal({B, T, A}),
                .u_A = normal({A}),
                .state_B3A = normal({B, 3, A}),
                .dy_BTA = normal({B, T, A}),
                .dstate_B3A = normal({B, 3, A})};
  // The denominator of a state is a sum of exponentials.
  inputs.state_B3A.select(1, 1).abs_();
  // A gradient of the scale p would not be defined by the reference.
  inputs.dstate_B3A.select(1, 2).zero_();
  return inputs;
}

Inputs cast(const Inputs& inputs, at::ScalarType activations, at::ScalarType exact) {
  return {inputs.w_log_A.to(exact),
          inputs.k_BTA.to(activations),
          inputs.v_BTA.to(activations),
          inputs.u_A.to(exact),
          inputs.state_B3A.to(exact),
          inputs.dy_BTA.to(activations),
          inputs.dstate_B3A.to(exact)};
}

// The same through Torch's autograd of the definition, computed in `dtype`. The final state's scale
// is free, so the kernel's own p is taken for it.
Results run_reference(const Inputs& rounded,
                      const at::Tensor& kernel_state_B3A,
                      at::ScalarType dtype) {
  const Inputs inputs = cast(rounded, dtype, dtype);
  const at::Tensor w = leaf(inputs.w_log_A), k = leaf(inputs.k_BTA), v = leaf(inputs.v_BTA),
                   u = leaf(inputs.u_A), a = leaf(inputs.state_B3A.select(1, 0)),
                   b = leaf(inputs.state_B3A.select(1, 1));
  const at::Tensor scale_in = inputs.state_B3A.select(1, 2).exp();
  const test::ReferenceWkv4 out = test::reference_wkv4(w, k, v, u, a * scale_in, b * scale_in);
  const at::Tensor p = kernel_state_B3A.to(dtype).select(1, 2);
  const at::Tensor state =
      at::stack({out.numerator_BA * (-p).exp(), out.denominator_BA * (-p).exp(), p}, 1);
  ((out.y_BTA * inputs.dy_BTA).sum() + (state * inputs.dstate_B3A).sum()).backward();
  const at::Tensor dstate = at::stack({a.grad(), b.grad(), at::zeros_like(a)}, 1);
  return {out.y_BTA.detach(), state.detach(), w.grad(), k.grad(), v.grad(), u.grad(), dstate};
}

// What is compared, with whether it has the dtype of the activations.
struct Compared {
  const char* name;
  at::Tensor Results::*tensor;
  bool is_activation;
};
constexpr Compared kCompared[] = {
    {"y", &Results::y_BTA, true},
    {"state", &Results::state_B3A, false},
    {"dk", &Results::dk_BTA, true},
    {"dv", &Results::dv_BTA, true},
    {"du", &Results::du_A, false},
    {"dw_log", &Results::dw_log_A, false},
    {"dstate", &Results::dstate_B3A, false},
};

void expect_close(const Results& actual,
                  const Results& expected,
                  double activations,
                  double exact) {
  for (const Compared& item : kCompared) {
    EXPECT_TRUE(test::close_l2(
        actual.*item.tensor, expected.*item.tensor, item.is_activation ? activations : exact))
        << item.name;
  }
}

// Allows twice the error that the definition has in fp32, and what the running maximum costs beside
// it: p is rounded once a token, and an exponent of 20 is known to 1e-6.
void expect_as_close_as_plain_fp32(const Results& actual,
                                   const Results& expected,
                                   const Results& plain) {
  for (const Compared& item : kCompared) {
    const double allowed = 2 * test::relative_l2(plain.*item.tensor, expected.*item.tensor) + 3e-6;
    EXPECT_TRUE(test::close_l2(actual.*item.tensor, expected.*item.tensor, allowed)) << item.name;
  }
}

class Wkv4 : public testing::TestWithParam<std::tuple<int64_t, int64_t, int64_t>> {};

TEST_P(Wkv4, MatchesTheDefinition) {
  const auto [B, T, A] = GetParam();
  const Inputs inputs = random_inputs(B, T, A, 2.0);
  const Results in_fp64 = run(inputs);
  expect_close(in_fp64, run_reference(inputs, in_fp64.state_B3A, at::kDouble), 1e-12, 1e-12);

  const Inputs single = cast(inputs, at::kFloat, at::kFloat);
  const Results in_fp32 = run(single);
  expect_as_close_as_plain_fp32(in_fp32,
                                run_reference(single, in_fp32.state_B3A, at::kDouble),
                                run_reference(single, in_fp32.state_B3A, at::kFloat));

  // A bf16 output is rounded once, by at most 2^-8 of itself; sums behind fp32 outputs are not.
  const Inputs half = cast(inputs, at::kBFloat16, at::kFloat);
  const Results in_bf16 = run(half);
  expect_close(in_bf16, run_reference(half, in_bf16.state_B3A, at::kDouble), 1.0 / 256, 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Sizes,
                         Wkv4,
                         testing::Values(std::tuple{1, 1, 1},
                                         std::tuple{3, 2, 15},
                                         std::tuple{1, 15, 17},
                                         std::tuple{3, 16, 63},
                                         std::tuple{1, 17, 16},
                                         std::tuple{2, 63, 33},
                                         std::tuple{1, 64, 5},
                                         std::tuple{3, 65, 65},
                                         std::tuple{1, 129, 48},
                                         std::tuple{2, 257, 7}),
                         [](const auto& size) {
                           return "B" + std::to_string(std::get<0>(size.param)) + "_T" +
                                  std::to_string(std::get<1>(size.param)) + "_A" +
                                  std::to_string(std::get<2>(size.param));
                         });

// Tokens whose exponents are far from the others', before them, behind them and between; bonuses
// that no sum can share a scale with.
TEST(Wkv4, MatchesTheDefinitionWhereExponentsLieFarApart) {
  Inputs inputs = random_inputs(2, 130, 40, 1.0);
  inputs.k_BTA.select(1, 40) += 70;
  inputs.k_BTA.slice(1, 90).slice(2, 0, 8) -= 65;
  inputs.k_BTA.select(1, 100) -= 60;
  inputs.u_A[30] = 60;
  inputs.u_A[31] = -60;
  const Results in_fp64 = run(inputs);
  expect_close(in_fp64, run_reference(inputs, in_fp64.state_B3A, at::kDouble), 1e-11, 1e-11);
  const Inputs single = cast(inputs, at::kFloat, at::kFloat);
  const Results in_fp32 = run(single);
  // An exponent of 70 is known to 4e-6.
  expect_close(in_fp32, run_reference(single, in_fp32.state_B3A, at::kDouble), 3e-5, 1.5e-4);
}

// ---- Document starts ----------------------------------------------------------------------------

constexpr int64_t kDocumentsT = 130;

// Rows with starts at the edges of chunks of 64 and 128, beside them, everywhere and nowhere.
at::Tensor document_starts() {
  const at::Tensor starts_BT = at::zeros({4, kDocumentsT}, at::kBool);
  for (const int64_t t : {0, 64, 128}) {
    starts_BT[0][t] = true;
  }
  for (const int64_t t : {1, 63, 65, 127, 129}) {
    starts_BT[1][t] = true;
  }
  starts_BT[2].fill_(true);
  return starts_BT;
}

std::vector<at::Tensor> run_documents(const Inputs& inputs,
                                      const at::Tensor& r_BTA,
                                      const at::Tensor& starts_BT) {
  const at::Tensor w = leaf(inputs.w_log_A), k = leaf(inputs.k_BTA), v = leaf(inputs.v_BTA),
                   u = leaf(inputs.u_A), state = leaf(inputs.state_B3A), r = leaf(r_BTA);
  const ops::Wkv4Output out = ops::wkv4(w, k, v, u, state, r, starts_BT);
  const at::Tensor target = (out.y_BTA * inputs.dy_BTA).sum().to(out.state_B3A.scalar_type()) +
                            (out.state_B3A * inputs.dstate_B3A).sum();
  target.backward();
  return {out.y_BTA.detach(),
          out.state_B3A.detach(),
          k.grad(),
          v.grad(),
          r.grad(),
          w.grad(),
          u.grad(),
          state.grad()};
}

// The definition, one document after another, each from nothing. Of the same order.
std::vector<at::Tensor> run_reference_documents(const Inputs& rounded,
                                                const at::Tensor& rounded_r_BTA,
                                                const at::Tensor& starts_BT,
                                                const at::Tensor& kernel_state_B3A,
                                                at::ScalarType dtype) {
  const Inputs inputs = cast(rounded, dtype, dtype);
  const at::Tensor w = leaf(inputs.w_log_A), k = leaf(inputs.k_BTA), v = leaf(inputs.v_BTA),
                   u = leaf(inputs.u_A), a = leaf(inputs.state_B3A.select(1, 0)),
                   b = leaf(inputs.state_B3A.select(1, 1)), r = leaf(rounded_r_BTA.to(dtype));
  const at::Tensor scale_in = inputs.state_B3A.select(1, 2).exp();
  std::vector<at::Tensor> rows, numerators, denominators;
  for (int64_t row = 0; row < k.size(0); ++row) {
    const auto of_row = [&](const at::Tensor& tensor) { return tensor.slice(0, row, row + 1); };
    test::ReferenceWkv4 document{{}, of_row(a) * of_row(scale_in), of_row(b) * of_row(scale_in)};
    std::vector<at::Tensor> documents;
    for (int64_t begin = 0, end = 0; begin < k.size(1); begin = end) {
      for (end = begin + 1; end < k.size(1) && !starts_BT[row][end].item<bool>();) {
        ++end;
      }
      if (starts_BT[row][begin].item<bool>()) {
        document.numerator_BA = document.denominator_BA = at::zeros({1, k.size(2)}, k.options());
      }
      document = test::reference_wkv4(w,
                                      of_row(k).slice(1, begin, end),
                                      of_row(v).slice(1, begin, end),
                                      u,
                                      document.numerator_BA,
                                      document.denominator_BA);
      documents.push_back(document.y_BTA);
    }
    rows.push_back(at::cat(documents, 1));
    numerators.push_back(document.numerator_BA);
    denominators.push_back(document.denominator_BA);
  }
  const at::Tensor p = kernel_state_B3A.to(dtype).select(1, 2);
  const at::Tensor y = at::cat(rows) * r.sigmoid();
  const at::Tensor state =
      at::stack({at::cat(numerators) * (-p).exp(), at::cat(denominators) * (-p).exp(), p}, 1);
  ((y * inputs.dy_BTA).sum() + (state * inputs.dstate_B3A).sum()).backward();
  return {y.detach(),
          state.detach(),
          k.grad(),
          v.grad(),
          r.grad(),
          w.grad(),
          u.grad(),
          at::stack({a.grad(), b.grad(), at::zeros_like(a)}, 1)};
}

TEST(Wkv4Starts, MatchTheDefinitionDocumentByDocument) {
  const Inputs inputs = random_inputs(4, kDocumentsT, 19, 2.0);
  const at::Tensor r_BTA = random_inputs(4, kDocumentsT, 19, 3.0).k_BTA.flip(1);
  const at::Tensor starts_BT = document_starts();
  for (const auto& [activations, exact] : {std::pair{at::kDouble, at::kDouble},
                                           std::pair{at::kFloat, at::kFloat},
                                           std::pair{at::kBFloat16, at::kFloat}}) {
    const Inputs rounded = cast(inputs, activations, exact);
    const at::Tensor r = r_BTA.to(activations);
    const auto actual = run_documents(rounded, r, starts_BT);
    const auto expected = run_reference_documents(rounded, r, starts_BT, actual[1], at::kDouble);
    const auto plain = run_reference_documents(rounded, r, starts_BT, actual[1], exact);
    for (size_t i = 0; i < actual.size(); ++i) {
      // As without starts; a bf16 result is rounded once.
      const double allowed = actual[i].scalar_type() == at::kDouble ? 1e-12
                             : actual[i].scalar_type() == at::kBFloat16
                                 ? 1.0 / 256
                                 : 2 * test::relative_l2(plain[i], expected[i]) + 3e-6;
      EXPECT_TRUE(test::close_l2(actual[i], expected[i], allowed))
          << activations << " result " << i;
    }
  }
}

TEST(Wkv4Starts, NowhereGiveTheBitsOfNone) {
  const Inputs inputs = cast(random_inputs(2, 70, 19, 2.0), at::kFloat, at::kFloat);
  const at::Tensor r_BTA = inputs.v_BTA.flip(1);
  const auto nowhere = run_documents(inputs, r_BTA, at::zeros({2, 70}, at::kBool));
  const auto none = run_documents(inputs, r_BTA, {});
  for (size_t i = 0; i < none.size(); ++i) {
    EXPECT_TRUE(test::same_bits(nowhere[i], none[i])) << "result " << i;
  }
}

TEST(Wkv4Starts, KeepANanInItsDocument) {
  Inputs inputs = cast(random_inputs(1, 9, 8, 1.0), at::kFloat, at::kFloat);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  inputs.state_B3A.fill_(nan);
  inputs.k_BTA[0][4].fill_(nan);
  at::Tensor starts_BT = at::zeros({1, 9}, at::kBool);
  for (const int64_t t : {0, 3, 6}) {
    starts_BT[0][t] = true;
  }
  const auto results = run_documents(inputs, inputs.v_BTA, starts_BT);
  for (const size_t i : {0, 2, 3, 4}) {
    const at::Tensor is_nan_T = results[i].isnan().any(2)[0];
    for (const int64_t t : {0, 1, 2, 6, 7, 8}) {
      EXPECT_FALSE(is_nan_T[t].item<bool>()) << "result " << i << ", token " << t;
    }
    EXPECT_TRUE(is_nan_T[4].item<bool>()) << "result " << i;
  }
  EXPECT_FALSE(results[1].isnan().any().item<bool>());
  EXPECT_EQ(results[7].abs().max().item<float>(), 0);
}

// Golden outputs with k from -95 to 95, where the definition overflows fp32.
class Wkv4Golden : public testing::TestWithParam<const char*> {};

TEST_P(Wkv4Golden, MatchesValuesAndGradients) {
  const std::string start = GetParam();
  auto golden = test::load_tensors(test::golden("wkv4.safetensors"));
  const at::Tensor state = golden[start + ".state_B3A"];
  const at::Tensor final_state = golden[start + ".final_B3A"];
  const Inputs inputs{
      .w_log_A = golden["w_log_A"],
      .k_BTA = golden["k_BTA"],
      .v_BTA = golden["v_BTA"],
      .u_A = golden["u_A"],
      .state_B3A = state,
      .dy_BTA = golden["dy_BTA"],
      .dstate_B3A = at::cat({golden["dfinal_B2A"], at::zeros_like(state.slice(1, 0, 1))}, 1)};
  for (const auto& [dtype, tolerance] :
       {std::pair{at::kDouble, 1e-11}, std::pair{at::kFloat, 1e-6}}) {
    const Results actual = run(cast(inputs, dtype, dtype));
    EXPECT_TRUE(test::close_l2(actual.y_BTA, golden[start + ".y_BTA"], tolerance)) << "y";
    // Both sides keep the running maximum as p, so that the scaled states agree as they are.
    EXPECT_TRUE(test::close_l2(actual.state_B3A, final_state, tolerance)) << "state";
    EXPECT_TRUE(test::close_l2(actual.dw_log_A, golden[start + ".dw_log_A"], tolerance)) << "dw";
    EXPECT_TRUE(test::close_l2(actual.du_A, golden[start + ".du_A"], tolerance)) << "du";
    EXPECT_TRUE(test::close_l2(actual.dk_BTA, golden[start + ".dk_BTA"], tolerance)) << "dk";
    EXPECT_TRUE(test::close_l2(actual.dv_BTA, golden[start + ".dv_BTA"], tolerance)) << "dv";
    EXPECT_TRUE(
        test::close_l2(actual.dstate_B3A.slice(1, 0, 2), golden[start + ".dstate_B2A"], tolerance))
        << "dstate";
  }
}

INSTANTIATE_TEST_SUITE_P(Starts, Wkv4Golden, testing::Values("fresh", "carried"));

TEST(Wkv4Backward, MatchesFiniteDifferencesInEveryInput) {
  const Inputs inputs = random_inputs(2, 5, 3, 1.0);
  const Results analytic = run(inputs);
  const auto value = [&](const Inputs& at) {
    const ops::Wkv4Output out = ops::wkv4(at.w_log_A, at.k_BTA, at.v_BTA, at.u_A, at.state_B3A);
    // The final p is a scale: compare what a and b stand for at the scale that was.
    const at::Tensor p = analytic.state_B3A.select(1, 2);
    const at::Tensor rescale = (out.state_B3A.select(1, 2) - p).exp();
    return ((out.y_BTA * inputs.dy_BTA).sum() +
            (out.state_B3A.select(1, 0) * rescale * inputs.dstate_B3A.select(1, 0)).sum() +
            (out.state_B3A.select(1, 1) * rescale * inputs.dstate_B3A.select(1, 1)).sum())
        .item<double>();
  };
  const auto check = [&](at::Tensor Inputs::*input, const at::Tensor& gradient, const char* name) {
    at::Tensor numeric = at::zeros_like(inputs.*input);
    constexpr double kStep = 1e-5;
    for (int64_t i = 0; i < numeric.numel(); ++i) {
      Inputs up = inputs;
      Inputs down = inputs;
      up.*input = (inputs.*input).clone();
      down.*input = (inputs.*input).clone();
      (up.*input).view(-1)[i] += kStep;
      (down.*input).view(-1)[i] -= kStep;
      numeric.view(-1)[i] = (value(up) - value(down)) / (2 * kStep);
    }
    EXPECT_TRUE(test::close_max(gradient, numeric, 1e-8)) << name;
  };
  check(&Inputs::w_log_A, analytic.dw_log_A, "w_log");
  check(&Inputs::k_BTA, analytic.dk_BTA, "k");
  check(&Inputs::v_BTA, analytic.dv_BTA, "v");
  check(&Inputs::u_A, analytic.du_A, "u");
  // Of the state only a and b have a gradient.
  Inputs fixed_scale = inputs;
  at::Tensor numeric_state = at::zeros_like(inputs.state_B3A);
  for (int64_t i = 0; i < numeric_state.numel(); ++i) {
    Inputs up = inputs;
    Inputs down = inputs;
    up.state_B3A = inputs.state_B3A.clone();
    down.state_B3A = inputs.state_B3A.clone();
    up.state_B3A.view(-1)[i] += 1e-5;
    down.state_B3A.view(-1)[i] -= 1e-5;
    numeric_state.view(-1)[i] = (value(up) - value(down)) / 2e-5;
  }
  EXPECT_TRUE(
      test::close_max(analytic.dstate_B3A.slice(1, 0, 2), numeric_state.slice(1, 0, 2), 1e-8));
}

TEST(Wkv4Forward, SplitWithTheStateHandedOverGivesTheSame) {
  const Inputs inputs = cast(random_inputs(2, 100, 20, 2.0), at::kFloat, at::kFloat);
  const ops::Wkv4Output whole =
      ops::wkv4(inputs.w_log_A, inputs.k_BTA, inputs.v_BTA, inputs.u_A, inputs.state_B3A);
  at::Tensor state = inputs.state_B3A;
  std::vector<at::Tensor> pieces;
  for (const auto& [begin, end] :
       {std::pair{0, 1}, std::pair{1, 64}, std::pair{64, 64}, std::pair{64, 100}}) {
    const ops::Wkv4Output piece = ops::wkv4(inputs.w_log_A,
                                            inputs.k_BTA.slice(1, begin, end),
                                            inputs.v_BTA.slice(1, begin, end),
                                            inputs.u_A,
                                            state);
    pieces.push_back(piece.y_BTA);
    state = piece.state_B3A;
  }
  EXPECT_TRUE(test::close_l2(at::cat(pieces, 1), whole.y_BTA, 1e-6));
  EXPECT_TRUE(test::close_l2(state, whole.state_B3A, 1e-6));
}

TEST(Wkv4Backward, OfNoTokensHandsTheStatesGradientThrough) {
  const Inputs inputs = random_inputs(2, 0, 5, 1.0);
  const Results results = run(inputs);
  EXPECT_TRUE(test::same_bits(results.state_B3A, inputs.state_B3A));
  EXPECT_TRUE(test::same_bits(results.dstate_B3A, inputs.dstate_B3A));
  EXPECT_EQ(results.dw_log_A.abs().max().item<double>(), 0);
}

TEST(Wkv4, GivesTheSameBitsOnAnyNumberOfThreads) {
  const Inputs inputs = cast(random_inputs(3, 70, 40, 2.0), at::kFloat, at::kFloat);
  const int threads = at::get_num_threads();
  const Results first = run(inputs);
  at::set_num_threads(1);
  const Results second = run(inputs);
  at::set_num_threads(threads);
  EXPECT_TRUE(test::same_bits(first.y_BTA, second.y_BTA));
  EXPECT_TRUE(test::same_bits(first.dk_BTA, second.dk_BTA));
  EXPECT_TRUE(test::same_bits(first.dw_log_A, second.dw_log_A));
  EXPECT_TRUE(test::same_bits(first.du_A, second.du_A));
}

TEST(Wkv4, PassesNanOn) {
  Inputs inputs = cast(random_inputs(1, 4, 16, 1.0), at::kFloat, at::kFloat);
  inputs.k_BTA[0][1][3] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = run(inputs).y_BTA;
  EXPECT_TRUE(y[0][1][3].isnan().item<bool>());
  EXPECT_FALSE(y[0][0].isnan().any().item<bool>());
  EXPECT_FALSE(y[0][3][2].isnan().item<bool>());
}

// The gate is the one step that follows the recurrence: sigmoid(r) times what there is without it.
TEST(Wkv4Gate, MultipliesByTheSigmoidOfR) {
  for (const auto& [dtype, tolerance] : {std::tuple{at::kDouble, 1e-13},
                                         std::tuple{at::kFloat, 1e-6},
                                         std::tuple{at::kBFloat16, 0.01}}) {
    const at::ScalarType exact = dtype == at::kDouble ? at::kDouble : at::kFloat;
    const Inputs inputs = cast(random_inputs(2, 67, 21, 1.0), dtype, exact);
    const at::Tensor r_BTA = (random_inputs(2, 67, 21, 6.0).k_BTA).to(dtype);
    const auto run_gated = [&](bool fused) {
      const Inputs leaves{leaf(inputs.w_log_A),
                          leaf(inputs.k_BTA),
                          leaf(inputs.v_BTA),
                          leaf(inputs.u_A),
                          leaf(inputs.state_B3A),
                          {},
                          {}};
      const at::Tensor r = leaf(r_BTA);
      const ops::Wkv4Output out = ops::wkv4(leaves.w_log_A,
                                            leaves.k_BTA,
                                            leaves.v_BTA,
                                            leaves.u_A,
                                            leaves.state_B3A,
                                            fused ? r : at::Tensor());
      const at::Tensor o_BTA = fused ? out.y_BTA : out.y_BTA * r.sigmoid();
      ((o_BTA * inputs.dy_BTA).sum() + (out.state_B3A * inputs.dstate_B3A).sum()).backward();
      return std::vector{o_BTA.detach(),
                         out.state_B3A.detach(),
                         r.grad(),
                         leaves.k_BTA.grad(),
                         leaves.v_BTA.grad(),
                         leaves.u_A.grad(),
                         leaves.w_log_A.grad(),
                         leaves.state_B3A.grad()};
    };
    const auto fused = run_gated(true), plain = run_gated(false);
    for (size_t i = 0; i < fused.size(); ++i) {
      EXPECT_TRUE(test::close_l2(fused[i], plain[i], tolerance)) << dtype << " result " << i;
    }
  }
}

TEST(Wkv4, RejectsMismatchedShapesAndDtypes) {
  const Inputs good = cast(random_inputs(2, 3, 4, 1.0), at::kFloat, at::kFloat);
  const auto text = [](const Inputs& bad) {
    return THROWN_TEXT(c10::Error,
                       ops::wkv4(bad.w_log_A, bad.k_BTA, bad.v_BTA, bad.u_A, bad.state_B3A));
  };
  Inputs bad = good;
  bad.v_BTA = at::zeros({2, 3, 5});
  EXPECT_THAT(text(bad), testing::HasSubstr("v_BTA is [2, 3, 5] but k_BTA is [2, 3, 4]"));
  EXPECT_THAT(THROWN_TEXT(c10::Error,
                          ops::wkv4(good.w_log_A,
                                    good.k_BTA,
                                    good.v_BTA,
                                    good.u_A,
                                    good.state_B3A,
                                    at::zeros({2, 3, 5}))),
              testing::HasSubstr("r_BTA is [2, 3, 5] but k_BTA is [2, 3, 4]"));
  bad = good;
  bad.state_B3A = at::zeros({1, 3, 4});
  EXPECT_THAT(text(bad), testing::HasSubstr("state_B3A is [1, 3, 4], expected [2, 3, 4]"));
  bad = good;
  bad.u_A = at::zeros({4}, at::kDouble);
  EXPECT_THAT(text(bad), testing::HasSubstr("one of them is Double"));
  EXPECT_THAT(THROWN_TEXT(c10::Error,
                          ops::wkv4(good.w_log_A,
                                    good.k_BTA,
                                    good.v_BTA,
                                    good.u_A,
                                    good.state_B3A,
                                    {},
                                    at::zeros({2, 4}, at::kBool))),
              testing::HasSubstr("starts_BT is Bool [2, 4], expected Bool [B, T] for k_BTA"));
  bad = good;
  bad.k_BTA = bad.k_BTA.to(at::kHalf);
  EXPECT_THAT(text(bad), testing::HasSubstr("expected bfloat16, float or double"));
}

TEST(Ops, AreAllRegistered) {
  for (const char* name : {"rookery::wkv4",
                           "rookery::wkv4_backward",
                           "rookery::adamw_",
                           "rookery::add_sum_of_squares",
                           "rookery::begin_adamw",
                           "rookery::split_master",
                           "rookery::join_master",
                           "rookery::cross_entropy",
                           "rookery::cross_entropy_gradient_",
                           "rookery::embedding",
                           "rookery::embedding_backward",
                           "rookery::few_rows_linear",
                           "rookery::gated_residual",
                           "rookery::gated_residual_backward",
                           "rookery::head_loss",
                           "rookery::layer_norm_shift_mix",
                           "rookery::layer_norm_shift_mix_backward",
                           "rookery::relu_squared_",
                           "rookery::relu_squared_backward_"}) {
    EXPECT_TRUE(c10::Dispatcher::singleton().findSchema({name, ""}).has_value()) << name;
  }
}

}  // namespace
}  // namespace rwkv
