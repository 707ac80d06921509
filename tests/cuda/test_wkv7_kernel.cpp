// wkv7, forward and backward, against its equations in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <ostream>

#include "cuda/wkv7_kernel.h"
#include "tests/cuda/kernel_test.h"
#include "train/gpu.h"

namespace rwkv::test {
namespace {

enum class Data { kRandom, kOneKey, kForgetting };
enum class Starts { kNone, kSome, kEverywhere };

struct Case {
  Wkv7Sizes sizes;
  Data data = Data::kRandom;
  Starts starts = Starts::kNone;
};
std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << "B " << c.sizes.B << ", T " << c.sizes.T << ", H " << c.sizes.H << ", N "
             << c.sizes.N << ", data " << static_cast<int>(c.data) << ", starts "
             << static_cast<int>(c.starts);
}

// Ends of blocks of 8, 16 and 32 tokens and beside them; every head size.
const Case kCases[] = {
    {{1, 1, 1, 32}},
    {{2, 7, 2, 32}},
    {{1, 8, 1, 64}},
    {{1, 17, 1, 64}},
    {{1, 9, 1, 128}},
    {{1, 32, 2, 32}},
    {{1, 65, 1, 32}},
    {{1, 41, 1, 64}, Data::kOneKey},
    {{1, 41, 1, 32}, Data::kForgetting},
    {{2, 37, 1, 32}, Data::kRandom, Starts::kSome},
    {{1, 20, 1, 32}, Data::kRandom, Starts::kEverywhere},
};

constexpr double kMostDecay = 0.60653065971263342;

struct Problem {
  Numbers r, w_raw, k, v, a, b, w0, state, dy, dstate;
  std::vector<char> starts;  // empty without
};

template <typename Element>
Problem problem_of(const Case& c) {
  const auto [B, T, H, N] = c.sizes;
  const int64_t all = B * T * H * N;
  Problem x{.r = rounded<Element>(normal(all, 1)),
            .w_raw = rounded<Element>(normal(all, 2)),
            .k = rounded<Element>(normal(all, 3)),
            .v = rounded<Element>(normal(all, 4)),
            .a = normal(all, 5),
            .b = {},
            .w0 = rounded<float>(normal(H * N, 6, 2)),
            .state = rounded<float>(normal(B * H * N * N, 7)),
            .dy = rounded<Element>(normal(all, 8)),
            .dstate = rounded<float>(normal(B * H * N * N, 9)),
            .starts = {}};
  // Keys of length 1; the learning rate between 0 and 1.
  const Numbers rate = normal(all, 10);
  for (int64_t head = 0; head < B * T * H; ++head) {
    const int64_t from = c.data == Data::kOneKey ? head % H * N : head * N;
    double squares = 0;
    for (int64_t i = 0; i < N; ++i) {
      squares += x.a[from + i] * x.a[from + i];
    }
    for (int64_t i = 0; i < N; ++i) {
      // The first head's key, which all copy, must not be scaled before it is copied.
      x.b.push_back(x.a[from + i] / std::sqrt(squares));
    }
  }
  for (int64_t i = 0; i < all; ++i) {
    x.a[i] = -x.b[i];
    x.b[i] *= c.data == Data::kOneKey ? 0.99 : 1 / (1 + std::exp(-rate[i]));
  }
  for (double& w0 : x.w0) {
    w0 = c.data == Data::kOneKey ? -12 : c.data == Data::kForgetting ? 8 : w0;
  }
  x.a = rounded<Element>(x.a);
  x.b = rounded<Element>(x.b);
  if (c.starts != Starts::kNone) {
    x.starts.assign(static_cast<size_t>(B * T), c.starts == Starts::kEverywhere);
    for (const int64_t t : {5, 8, 31, 32, 33, 50}) {
      if (t < T) {
        x.starts[t] = 1;
      }
    }
    x.starts[(B - 1) * T] = 1;
  }
  return x;
}

// y, state, then the gradients: r, w_raw, k, v, a, b, w0 (of each batch row), state.
constexpr const char* kNames[] = {
    "y", "state", "dr", "dw_raw", "dk", "dv", "da", "db", "dw0", "dstate"};

Outputs reference(const Case& c, const Problem& x) {
  const auto [B, T, H, N] = c.sizes;
  const int64_t all = B * T * H * N, states = B * H * N * N;
  Outputs out{Numbers(all),
              Numbers(states),
              Numbers(all),
              Numbers(all),
              Numbers(all),
              Numbers(all),
              Numbers(all),
              Numbers(all),
              Numbers(B * H * N),
              Numbers(states)};
  for (int64_t row = 0; row < B; ++row) {
    for (int64_t head = 0; head < H; ++head) {
      const auto at = [&](int64_t t, int64_t i) { return ((row * T + t) * H + head) * N + i; };
      const auto starts = [&](int64_t t) {
        return !x.starts.empty() && t < T && x.starts[row * T + t] != 0;
      };
      const int64_t first = (row * H + head) * N * N;
      const auto gate = [&](int64_t t, int64_t j) {
        return 1 / (1 + std::exp(-(x.w0[head * N + j] + x.w_raw[at(t, j)])));
      };
      const auto decay = [&](int64_t t, int64_t j) { return std::exp(-kMostDecay * gate(t, j)); };
      // S[t] is the state before token t, [value][key]; a start's is zero.
      std::vector<Numbers> S(T + 1, Numbers(N * N)), u(T, Numbers(N));
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          S[0][i * N + j] = x.state[first + j * N + i];
        }
      }
      Numbers last;
      for (int64_t t = 0; t < T; ++t) {
        if (starts(t)) {
          S[t].assign(N * N, 0);
        }
        for (int64_t i = 0; i < N; ++i) {
          for (int64_t j = 0; j < N; ++j) {
            u[t][i] += S[t][i * N + j] * x.a[at(t, j)];
          }
          for (int64_t j = 0; j < N; ++j) {
            S[t + 1][i * N + j] = S[t][i * N + j] * decay(t, j) + u[t][i] * x.b[at(t, j)] +
                                  x.v[at(t, i)] * x.k[at(t, j)];
            out[0][at(t, i)] += S[t + 1][i * N + j] * x.r[at(t, j)];
          }
        }
        last = S[t + 1];
      }
      Numbers D(N * N), after = last;
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          out[1][first + j * N + i] = last[i * N + j];
          D[i * N + j] = x.dstate[first + j * N + i];
        }
      }
      // S[t + 1] may have been set to zero by a start: the state after token t again.
      for (int64_t t = T - 1; t >= 0; --t) {
        for (int64_t i = 0; i < N; ++i) {
          for (int64_t j = 0; j < N; ++j) {
            after[i * N + j] = S[t][i * N + j] * decay(t, j) + u[t][i] * x.b[at(t, j)] +
                               x.v[at(t, i)] * x.k[at(t, j)];
          }
        }
        Numbers du(N);
        for (int64_t i = 0; i < N; ++i) {
          for (int64_t j = 0; j < N; ++j) {
            double& d = D[i * N + j];
            d += x.dy[at(t, i)] * x.r[at(t, j)];
            out[2][at(t, j)] += after[i * N + j] * x.dy[at(t, i)];
            out[4][at(t, j)] += d * x.v[at(t, i)];
            out[5][at(t, i)] += d * x.k[at(t, j)];
            out[7][at(t, j)] += d * u[t][i];
            du[i] += d * x.b[at(t, j)];
          }
        }
        for (int64_t j = 0; j < N; ++j) {
          double dw = 0;
          for (int64_t i = 0; i < N; ++i) {
            dw += D[i * N + j] * S[t][i * N + j];
            out[6][at(t, j)] += S[t][i * N + j] * du[i];
          }
          const double dw_raw = dw * decay(t, j) * -kMostDecay * gate(t, j) * (1 - gate(t, j));
          out[3][at(t, j)] = dw_raw;
          out[8][(row * H + head) * N + j] += dw_raw;
          for (int64_t i = 0; i < N; ++i) {
            D[i * N + j] = starts(t) ? 0 : D[i * N + j] * decay(t, j) + du[i] * x.a[at(t, j)];
          }
        }
      }
      for (int64_t i = 0; i < N; ++i) {
        for (int64_t j = 0; j < N; ++j) {
          out[9][first + j * N + i] = D[i * N + j];
        }
      }
    }
  }
  return out;
}

template <typename Element>
Outputs run(const Case& c, const Problem& x, bool with_dstate = true) {
  const auto [B, T, H, N] = c.sizes;
  const int64_t all = B * T * H * N, states = B * H * N * N;
  const DeviceArray<Element> r(x.r), w_raw(x.w_raw), k(x.k), v(x.v), a(x.a), b(x.b), dy(x.dy);
  const DeviceArray<float> w0(x.w0), state(x.state), dstate_out(x.dstate);
  const DeviceArray<uint8_t> starts(x.starts.empty() ? Numbers(1)
                                                     : Numbers(x.starts.begin(), x.starts.end()));
  DeviceArray<Element> y(all), dr(all), dw_raw(all), dk(all), dv(all), da(all), db(all);
  DeviceArray<float> state_out(states), u(all), carries(wkv7_carries_floats(c.sizes)), du(all),
      dw0(B * H * N), dstate(states);
  const Wkv7Inputs<Element> in{
      .sizes = c.sizes,
      .r = r.data(),
      .w_raw = w_raw.data(),
      .k = k.data(),
      .v = v.data(),
      .a = a.data(),
      .b = b.data(),
      .w0 = w0.data(),
      .starts = x.starts.empty() ? nullptr : reinterpret_cast<const bool*>(starts.data())};
  expect_launched(launch_wkv7(Wkv7Forward<Element>{.in = in,
                                                   .state = state.data(),
                                                   .y = y.data(),
                                                   .state_out = state_out.data(),
                                                   .u = u.data(),
                                                   .carries = carries.data()},
                              nullptr),
                  "wkv7");
  // Without what backward starts from: the same.
  DeviceArray<Element> y_alone(all);
  DeviceArray<float> state_alone(states);
  expect_launched(launch_wkv7(Wkv7Forward<Element>{.in = in,
                                                   .state = state.data(),
                                                   .y = y_alone.data(),
                                                   .state_out = state_alone.data(),
                                                   .u = nullptr,
                                                   .carries = nullptr},
                              nullptr),
                  "wkv7");
  EXPECT_EQ(state_alone.numbers(), state_out.numbers());
  expect_launched(launch_wkv7_backward(
                      Wkv7Backward<Element>{.in = in,
                                            .u = u.data(),
                                            .carries = carries.data(),
                                            .dy = dy.data(),
                                            .dstate_out = with_dstate ? dstate_out.data() : nullptr,
                                            .dr = dr.data(),
                                            .dw_raw = dw_raw.data(),
                                            .dk = dk.data(),
                                            .dv = dv.data(),
                                            .da = da.data(),
                                            .db = db.data(),
                                            .dw0 = dw0.data(),
                                            .dstate = dstate.data(),
                                            .du = du.data()},
                      nullptr),
                  "wkv7 backward");
  return {y.numbers(),
          state_out.numbers(),
          dr.numbers(),
          dw_raw.numbers(),
          dk.numbers(),
          dv.numbers(),
          da.numbers(),
          db.numbers(),
          dw0.numbers(),
          dstate.numbers()};
}

template <typename Element>
class Wkv7Kernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(Wkv7Kernel, Elements);

TYPED_TEST(Wkv7Kernel, MatchesTheDefinition) {
  for (const Case& c : kCases) {
    const Problem x = problem_of<TypeParam>(c);
    const Outputs expected = reference(c, x);
    const Outputs actual = same_in_every_order([&] { return run<TypeParam>(c, x); });
    for (size_t i = 0; i < expected.size(); ++i) {
      const bool is_rounded = sizeof(TypeParam) == 2 && i != 1 && i < 8;
      // Eight steps back at the smallest decay lose a factor of 128, and 1 less a gate of nearly 1
      // most of its digits.
      const double exact = c.data == Data::kForgetting ? 1e-4 : 3e-6;
      EXPECT_TRUE(close(actual[i], expected[i], is_rounded ? 4e-3 : exact))
          << kNames[i] << " at " << c;
    }
  }
}

TYPED_TEST(Wkv7Kernel, WithoutAGradientOfTheLastStateTakesZero) {
  const Case c{{1, 19, 1, 32}};
  Problem x = problem_of<TypeParam>(c);
  const Outputs without = run<TypeParam>(c, x, /*with_dstate=*/false);
  x.dstate.assign(x.dstate.size(), 0);
  EXPECT_EQ(without, run<TypeParam>(c, x));
}

TYPED_TEST(Wkv7Kernel, KeepsANanInItsDocument) {
  const Case c{{1, 9, 1, 32}, Data::kRandom, Starts::kSome};
  Problem x = problem_of<TypeParam>(c);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  x.starts.assign(9, 0);
  x.starts[0] = x.starts[3] = x.starts[6] = 1;
  x.state.assign(x.state.size(), nan);
  for (Numbers* of_token : {&x.r, &x.w_raw, &x.k, &x.v, &x.a, &x.b}) {
    std::fill_n(of_token->begin() + 4 * 32, 32, nan);
  }
  const Outputs out = run<TypeParam>(c, x);
  for (const size_t i : {0, 2, 3, 4, 5, 6, 7}) {
    for (int64_t at = 0; at < 9 * 32; ++at) {
      const int64_t t = at / 32;
      if (t < 3 || t >= 6) {
        EXPECT_FALSE(std::isnan(out[i][at])) << kNames[i] << " of token " << t;
      }
    }
  }
  EXPECT_TRUE(std::isnan(out[0][4 * 32]));
  for (size_t i = 0; i < out[1].size(); ++i) {
    EXPECT_FALSE(std::isnan(out[1][i]));
    EXPECT_EQ(out[9][i], 0);
  }
}

TYPED_TEST(Wkv7Kernel, RefusesOtherHeadSizes) {
  Wkv7Forward<TypeParam> forward{};
  forward.in.sizes = {1, 1, 1, 48};
  EXPECT_EQ(launch_wkv7(forward, nullptr), cudaErrorInvalidValue);
  Wkv7Backward<TypeParam> backward{};
  backward.in.sizes = {1, 1, 1, 48};
  EXPECT_EQ(launch_wkv7_backward(backward, nullptr), cudaErrorInvalidValue);
}

TEST(Wkv7HeadSizes, AreThoseThatATrainerIsToldOf) {
  for (int64_t N = 1; N <= 256; ++N) {
    EXPECT_EQ(is_wkv7_head_size(N), std::ranges::find(kCudaHeadSizes, N) != kCudaHeadSizes.end())
        << N;
  }
}

}  // namespace
}  // namespace rwkv::test
