// wkv7_inputs and wkv7_output, forward and backward, against their equations in float64.
#include <cmath>
#include <ostream>

#include "cuda/wkv7_frame_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

struct Case {
  Wkv7FrameSizes sizes;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "tokens " << c.sizes.tokens << ", H " << c.sizes.H << ", N " << c.sizes.N;
}

// Strips of 32 tokens, their ends, and warps that do not fill a block.
const Case kCases[] = {
    {{1, 1, 32}}, {{31, 1, 64}}, {{32, 2, 32}}, {{3, 1, 128}}, {{35, 3, 64}}, {{1, 9, 32}}};

constexpr float kEps = 64e-5f;

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

template <typename Element>
class Wkv7FrameKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(Wkv7FrameKernel, Elements);

// Of a result that is rounded once.
template <typename Element>
constexpr double kTolerance = sizeof(Element) == 2 ? 4e-3 : 3e-6;

template <typename Element>
void expect_close(const Outputs& actual, const Outputs& expected, const Case& c) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_TRUE(close(actual[i], expected[i], kTolerance<Element>))
        << "result " << i << " at " << c;
  }
}

// ---- wkv7_inputs --------------------------------------------------------------------------------

struct InputsProblem {
  Numbers k, a_raw, v, v_raw, v_first, k_k, k_a, dk_out, da, db, dv_out;
};
template <typename Element>
InputsProblem inputs_problem(const Case& c) {
  const int64_t C = c.sizes.H * c.sizes.N, all = c.sizes.tokens * C;
  const auto numbers = [](int64_t size, uint64_t seed) {
    return rounded<Element>(normal(size, seed));
  };
  InputsProblem x{numbers(all, 1),
                  numbers(all, 2),
                  numbers(all, 3),
                  numbers(all, 4),
                  numbers(all, 5),
                  numbers(C, 6),
                  numbers(C, 7),
                  numbers(all, 8),
                  numbers(all, 9),
                  numbers(all, 10),
                  numbers(all, 11)};
  // A head whose key is nothing.
  std::fill_n(x.k.begin(), c.sizes.N, 0.0);
  return x;
}

// k', a, b, v'; then dk, da_raw, dv, dv_raw, dv_first, dk_k, dk_a.
Outputs inputs_reference(const Case& c, const InputsProblem& x) {
  const int64_t N = c.sizes.N, C = c.sizes.H * N, all = c.sizes.tokens * C;
  Outputs out(9, Numbers(all));
  out.insert(out.end(), 2, Numbers(C));
  for (int64_t head = 0; head < all; head += N) {
    double squares = 0, products = 0;
    const auto channel = [&](int64_t i) { return (head + i) % C; };
    const auto p = [&](int64_t i) { return x.k[head + i] * x.k_k[channel(i)]; };
    const auto alpha = [&](int64_t i) { return sigmoid(x.a_raw[head + i]); };
    const auto dkk = [&](int64_t i) { return alpha(i) * x.db[head + i] - x.da[head + i]; };
    for (int64_t i = 0; i < N; ++i) {
      squares += p(i) * p(i);
    }
    const double norm = std::max(std::sqrt(squares), 1e-12);
    for (int64_t i = 0; i < N; ++i) {
      products += p(i) / norm * dkk(i);
    }
    for (int64_t i = 0; i < N; ++i) {
      const int64_t at = head + i;
      const double kk = p(i) / norm, k_k = x.k_k[channel(i)], k_a = x.k_a[channel(i)];
      const double dp = (dkk(i) - (std::sqrt(squares) > 1e-12 ? kk * products : 0)) / norm;
      const double q = sigmoid(x.v_raw[at]);
      out[0][at] = x.k[at] * (1 + (alpha(i) - 1) * k_a);
      out[1][at] = -kk;
      out[2][at] = kk * alpha(i);
      out[3][at] = x.v[at] + (x.v_first[at] - x.v[at]) * q;
      out[4][at] = x.dk_out[at] * (1 + (alpha(i) - 1) * k_a) + k_k * dp;
      out[5][at] = (kk * x.db[at] + x.dk_out[at] * x.k[at] * k_a) * alpha(i) * (1 - alpha(i));
      out[6][at] = (1 - q) * x.dv_out[at];
      out[7][at] = x.dv_out[at] * (x.v_first[at] - x.v[at]) * q * (1 - q);
      out[8][at] = q * x.dv_out[at];
      out[9][channel(i)] += x.k[at] * dp;
      out[10][channel(i)] += x.dk_out[at] * x.k[at] * (alpha(i) - 1);
    }
  }
  return out;
}

template <typename Element>
Outputs run_inputs(const Case& c, const InputsProblem& x, bool is_first) {
  const int64_t C = c.sizes.H * c.sizes.N, all = c.sizes.tokens * C;
  const DeviceArray<Element> k(x.k), a_raw(x.a_raw), v(x.v), v_raw(x.v_raw), v_first(x.v_first),
      k_k(x.k_k), k_a(x.k_a), dk_out(x.dk_out), da(x.da), db(x.db), dv_out(x.dv_out);
  DeviceArray<Element> k_out(all), a(all), b(all), v_out(all), dk(all), da_raw(all), dv(all),
      dv_raw(all), dv_first(all), dk_k(C), dk_a(C);
  DeviceArray<float> scratch(wkv7_frame_scratch_floats(c.sizes));
  const auto unless_first = [&](auto* pointer) { return is_first ? nullptr : pointer; };
  expect_launched(
      launch_wkv7_inputs(Wkv7InputsForward<Element>{.sizes = c.sizes,
                                                    .k = k.data(),
                                                    .a_raw = a_raw.data(),
                                                    .v = v.data(),
                                                    .v_raw = unless_first(v_raw.data()),
                                                    .v_first = unless_first(v_first.data()),
                                                    .k_k = k_k.data(),
                                                    .k_a = k_a.data(),
                                                    .k_out = k_out.data(),
                                                    .a = a.data(),
                                                    .b = b.data(),
                                                    .v_out = unless_first(v_out.data())},
                         nullptr),
      "wkv7_inputs");
  expect_launched(launch_wkv7_inputs_backward(
                      Wkv7InputsBackward<Element>{.sizes = c.sizes,
                                                  .k = k.data(),
                                                  .a_raw = a_raw.data(),
                                                  .v = unless_first(v.data()),
                                                  .v_raw = unless_first(v_raw.data()),
                                                  .v_first = unless_first(v_first.data()),
                                                  .k_k = k_k.data(),
                                                  .k_a = k_a.data(),
                                                  .dk_out = dk_out.data(),
                                                  .da = da.data(),
                                                  .db = db.data(),
                                                  .dv_out = unless_first(dv_out.data()),
                                                  .dk = dk.data(),
                                                  .da_raw = da_raw.data(),
                                                  .dv = unless_first(dv.data()),
                                                  .dv_raw = unless_first(dv_raw.data()),
                                                  .dv_first = unless_first(dv_first.data()),
                                                  .dk_k = dk_k.data(),
                                                  .dk_a = dk_a.data(),
                                                  .scratch = scratch.data()},
                      nullptr),
                  "wkv7_inputs backward");
  if (is_first) {
    return {k_out.numbers(),
            a.numbers(),
            b.numbers(),
            dk.numbers(),
            da_raw.numbers(),
            dk_k.numbers(),
            dk_a.numbers()};
  }
  return {k_out.numbers(),
          a.numbers(),
          b.numbers(),
          v_out.numbers(),
          dk.numbers(),
          da_raw.numbers(),
          dv.numbers(),
          dv_raw.numbers(),
          dv_first.numbers(),
          dk_k.numbers(),
          dk_a.numbers()};
}

TYPED_TEST(Wkv7FrameKernel, InputsMatchTheDefinition) {
  for (const Case& c : kCases) {
    const InputsProblem x = inputs_problem<TypeParam>(c);
    Outputs expected = inputs_reference(c, x);
    expect_close<TypeParam>(
        same_in_every_order([&] { return run_inputs<TypeParam>(c, x, false); }), expected, c);
    // The first layer has no gate of values.
    expected.erase(expected.begin() + 6, expected.begin() + 9);
    expected.erase(expected.begin() + 3);
    expect_close<TypeParam>(
        same_in_every_order([&] { return run_inputs<TypeParam>(c, x, true); }), expected, c);
  }
}

// ---- wkv7_output --------------------------------------------------------------------------------

struct OutputProblem {
  Numbers y, r, k, v, g, r_k, weight, bias, dout;
};
template <typename Element>
OutputProblem output_problem(const Case& c) {
  const int64_t C = c.sizes.H * c.sizes.N, all = c.sizes.tokens * C;
  const auto numbers = [](int64_t size, uint64_t seed) {
    return rounded<Element>(normal(size, seed));
  };
  OutputProblem x{numbers(all, 1),
                  numbers(all, 2),
                  numbers(all, 3),
                  numbers(all, 4),
                  numbers(all, 5),
                  numbers(C, 6),
                  numbers(C, 7),
                  numbers(C, 8),
                  numbers(all, 9)};
  // A mean far from zero: a variance from squares alone would lose it.
  for (double& y : x.y) {
    y += 20;
  }
  x.y = rounded<Element>(x.y);
  return x;
}

// out; then dy, dr, dk, dv, dg, dr_k, dweight, dbias.
Outputs output_reference(const Case& c, const OutputProblem& x) {
  const int64_t N = c.sizes.N, C = c.sizes.H * N, all = c.sizes.tokens * C;
  Outputs out(6, Numbers(all));
  out.insert(out.end(), 3, Numbers(C));
  for (int64_t head = 0; head < all; head += N) {
    const auto channel = [&](int64_t i) { return (head + i) % C; };
    double mean = 0, variance = 0, bonus = 0, ds = 0, e = 0, e_y = 0;
    for (int64_t i = 0; i < N; ++i) {
      mean += x.y[head + i] / static_cast<double>(N);
      bonus += x.r[head + i] * x.k[head + i] * x.r_k[channel(i)];
    }
    for (int64_t i = 0; i < N; ++i) {
      variance += (x.y[head + i] - mean) * (x.y[head + i] - mean) / static_cast<double>(N);
    }
    const double rstd = 1 / std::sqrt(variance + kEps);
    const auto normal_y = [&](int64_t i) { return (x.y[head + i] - mean) * rstd; };
    const auto dz = [&](int64_t i) { return x.dout[head + i] * x.g[head + i]; };
    for (int64_t i = 0; i < N; ++i) {
      ds += dz(i) * x.v[head + i];
      e += dz(i) * x.weight[channel(i)] / static_cast<double>(N);
      e_y += dz(i) * x.weight[channel(i)] * normal_y(i) / static_cast<double>(N);
    }
    for (int64_t i = 0; i < N; ++i) {
      const int64_t at = head + i, ch = channel(i);
      const double z = normal_y(i) * x.weight[ch] + x.bias[ch] + bonus * x.v[at];
      out[0][at] = z * x.g[at];
      out[1][at] = rstd * (dz(i) * x.weight[ch] - e - normal_y(i) * e_y);
      out[2][at] = ds * x.k[at] * x.r_k[ch];
      out[3][at] = ds * x.r[at] * x.r_k[ch];
      out[4][at] = bonus * dz(i);
      out[5][at] = x.dout[at] * z;
      out[6][ch] += ds * x.r[at] * x.k[at];
      out[7][ch] += dz(i) * normal_y(i);
      out[8][ch] += dz(i);
    }
  }
  return out;
}

template <typename Element>
Outputs run_output(const Case& c, const OutputProblem& x) {
  const int64_t C = c.sizes.H * c.sizes.N, all = c.sizes.tokens * C;
  const DeviceArray<Element> y(x.y), r(x.r), k(x.k), v(x.v), g(x.g), r_k(x.r_k), weight(x.weight),
      bias(x.bias), dout(x.dout);
  DeviceArray<Element> out(all), dy(all), dr(all), dk(all), dv(all), dg(all), dr_k(C), dweight(C),
      dbias(C);
  DeviceArray<float> scratch(wkv7_frame_scratch_floats(c.sizes));
  expect_launched(launch_wkv7_output(Wkv7OutputForward<Element>{.sizes = c.sizes,
                                                                .y = y.data(),
                                                                .r = r.data(),
                                                                .k = k.data(),
                                                                .v = v.data(),
                                                                .g = g.data(),
                                                                .r_k = r_k.data(),
                                                                .weight = weight.data(),
                                                                .bias = bias.data(),
                                                                .eps = kEps,
                                                                .out = out.data()},
                                     nullptr),
                  "wkv7_output");
  expect_launched(
      launch_wkv7_output_backward(Wkv7OutputBackward<Element>{.sizes = c.sizes,
                                                              .y = y.data(),
                                                              .r = r.data(),
                                                              .k = k.data(),
                                                              .v = v.data(),
                                                              .g = g.data(),
                                                              .r_k = r_k.data(),
                                                              .weight = weight.data(),
                                                              .bias = bias.data(),
                                                              .eps = kEps,
                                                              .dout = dout.data(),
                                                              .dy = dy.data(),
                                                              .dr = dr.data(),
                                                              .dk = dk.data(),
                                                              .dv = dv.data(),
                                                              .dg = dg.data(),
                                                              .dr_k = dr_k.data(),
                                                              .dweight = dweight.data(),
                                                              .dbias = dbias.data(),
                                                              .scratch = scratch.data()},
                                  nullptr),
      "wkv7_output backward");
  return {out.numbers(),
          dy.numbers(),
          dr.numbers(),
          dk.numbers(),
          dv.numbers(),
          dg.numbers(),
          dr_k.numbers(),
          dweight.numbers(),
          dbias.numbers()};
}

TYPED_TEST(Wkv7FrameKernel, OutputMatchesTheDefinition) {
  for (const Case& c : kCases) {
    const OutputProblem x = output_problem<TypeParam>(c);
    expect_close<TypeParam>(same_in_every_order([&] { return run_output<TypeParam>(c, x); }),
                            output_reference(c, x),
                            c);
  }
}

TYPED_TEST(Wkv7FrameKernel, RefusesOtherHeadSizes) {
  Wkv7InputsForward<TypeParam> inputs{};
  inputs.sizes = {1, 1, 48};
  EXPECT_EQ(launch_wkv7_inputs(inputs, nullptr), cudaErrorInvalidValue);
  Wkv7OutputForward<TypeParam> output{};
  output.sizes = {1, 1, 48};
  EXPECT_EQ(launch_wkv7_output(output, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rwkv::test
