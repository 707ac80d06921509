// Each wkv4 kernel, forward and backward, against the definition in float64, and the kernels
// against each other.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cuda/wkv4_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

constexpr double kLogOfNothing = -1e38;

// What goes in, as doubles that the kernel's types hold exactly. Empty r, starts, dstate_out: none.
struct Inputs {
  int64_t B, T, A;
  Numbers w_log, k, v, u, state, r;
  Numbers starts;
  Numbers dy, dstate_out;
};

// What comes out. The scale of a state is free: as e^p a, e^p b and nothing else they are compared.
struct Results {
  Numbers y, numerator, denominator;
  Numbers dw_log, dk, dv, du, da, db, dr;
};

size_t index(int64_t i) {
  return static_cast<size_t>(i);
}
double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// exp of a number of any size, in long double: sums in e^k of float64 end at k = 709.
long double power(double x) {
  return std::exp(static_cast<long double>(x));
}

// The definition. `scale` [B, A] is p of the state that the kernel gave out: dstate_out is the
// gradient of its a and b.
Results definition(const Inputs& in, const Numbers& scale) {
  const int64_t B = in.B, T = in.T, A = in.A;
  Results out;
  out.y.resize(in.k.size());
  out.dk = out.dv = out.y;
  if (!in.r.empty()) {
    out.dr = out.y;
  }
  out.numerator.resize(index(B * A));
  out.denominator = out.da = out.db = out.numerator;
  out.dw_log.resize(index(A));
  out.du = out.dw_log;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < A; ++c) {
      const auto at = [&](int64_t t) { return index((b * T + t) * A + c); };
      const auto starts = [&](int64_t t) {
        return !in.starts.empty() && in.starts[index(b * T + t)] != 0;
      };
      const auto state_at = [&](int64_t plane) { return index((b * 3 + plane) * A + c); };
      const long double fade = power(in.w_log[index(c)]);
      const long double bonus = power(in.u[index(c)]);
      const long double in_scale = power(in.state[state_at(2)]);
      std::vector<long double> num(index(T + 1)), den(index(T + 1));
      long double a = in.state[state_at(0)] * in_scale, d = in.state[state_at(1)] * in_scale;
      for (int64_t t = 0; t < T; ++t) {
        if (starts(t)) {
          a = d = 0;
        }
        num[index(t)] = a;
        den[index(t)] = d;
        const long double e = power(in.k[at(t)]);
        const long double y = (a + bonus * e * in.v[at(t)]) / (d + bonus * e);
        out.y[at(t)] = static_cast<double>(in.r.empty() ? y : sigmoid(in.r[at(t)]) * y);
        a = fade * a + e * in.v[at(t)];
        d = fade * d + e;
      }
      out.numerator[index(b * A + c)] = static_cast<double>(a / power(scale[index(b * A + c)]));
      out.denominator[index(b * A + c)] = static_cast<double>(d / power(scale[index(b * A + c)]));

      long double al = 0, be = 0, dw = 0, du = 0;
      if (!in.dstate_out.empty()) {
        const long double out_scale = power(scale[index(b * A + c)]);
        al = in.dstate_out[state_at(0)] / out_scale;
        be = -in.dstate_out[state_at(1)] / out_scale;
      }
      for (int64_t t = T - 1; t >= 0; --t) {
        const long double e = power(in.k[at(t)]);
        const long double v = in.v[at(t)];
        const long double denominator = den[index(t)] + bonus * e;
        const long double y = (num[index(t)] + bonus * e * v) / denominator;
        long double dy = in.dy[at(t)];
        if (!in.r.empty()) {
          const double gate = sigmoid(in.r[at(t)]);
          out.dr[at(t)] = static_cast<double>(dy * y * gate * (1 - gate));
          dy *= gate;
        }
        const long double s = dy / denominator;
        out.dv[at(t)] = static_cast<double>(bonus * e * s + e * al);
        out.dk[at(t)] = static_cast<double>(bonus * e * s * (v - y) + e * (al * v - be));
        du += bonus * e * s * (v - y);
        dw += fade * (num[index(t)] * al - den[index(t)] * be);
        al = fade * al + s;
        be = fade * be + s * y;
        if (starts(t)) {
          al = be = 0;
        }
      }
      out.da[index(b * A + c)] = static_cast<double>(al * in_scale);
      out.db[index(b * A + c)] = static_cast<double>(-be * in_scale);
      out.dw_log[index(c)] += static_cast<double>(dw);
      out.du[index(c)] += static_cast<double>(du);
    }
  }
  return out;
}

// One plane of a [B, 3, A].
Numbers plane_of(const Numbers& state, int64_t plane, const Inputs& in) {
  Numbers plane_BA;
  for (int64_t b = 0; b < in.B; ++b) {
    const auto first = state.begin() + (b * 3 + plane) * in.A;
    plane_BA.insert(plane_BA.end(), first, first + in.A);
  }
  return plane_BA;
}

// All that a forward and a backward kernel write; kDr only with a gate.
enum Output { kY, kState, kDw, kDk, kDv, kDu, kDstate, kDr };

template <typename Element>
Outputs run(const Inputs& in,
            Wkv4Kernel forward = Wkv4Kernel::kChunkScan,
            Wkv4Kernel backward = Wkv4Kernel::kChunkScan) {
  const int64_t B = in.B, T = in.T, A = in.A, size = B * T * A;
  const DeviceArray<float> w_log(in.w_log), u(in.u), state(in.state), dstate_out(in.dstate_out);
  const DeviceArray<Element> k(in.k), v(in.v), r(in.r), dy(in.dy);
  const DeviceArray<uint8_t> starts(in.starts);
  const auto* start_flags =
      in.starts.empty() ? nullptr : reinterpret_cast<const bool*>(starts.data());
  DeviceArray<Element> y(size), dk(size), dv(size), dr(in.r.empty() ? 0 : size);
  DeviceArray<float> state_out(B * 3 * A), dw_log(A), du(A), dstate(B * 3 * A);
  DeviceArray<float> carries(wkv4_carries_floats(B, T, A));
  DeviceArray<float> scratch(wkv4_scratch_floats<Element>(forward, B, T, A, false));
  DeviceArray<float> back_scratch(wkv4_scratch_floats<Element>(backward, B, T, A, true));
  expect_launched(launch_wkv4(forward,
                              Wkv4Forward<Element>{.B = B,
                                                   .T = T,
                                                   .A = A,
                                                   .w_log = w_log.data(),
                                                   .k = k.data(),
                                                   .v = v.data(),
                                                   .u = u.data(),
                                                   .state = state.data(),
                                                   .r = in.r.empty() ? nullptr : r.data(),
                                                   .starts = start_flags,
                                                   .y = y.data(),
                                                   .state_out = state_out.data(),
                                                   .carries = carries.data(),
                                                   .scratch = scratch.data()},
                              nullptr),
                  "wkv4");
  expect_launched(
      launch_wkv4_backward(
          backward,
          Wkv4Backward<Element>{.B = B,
                                .T = T,
                                .A = A,
                                .w_log = w_log.data(),
                                .k = k.data(),
                                .v = v.data(),
                                .u = u.data(),
                                .state = state.data(),
                                .r = in.r.empty() ? nullptr : r.data(),
                                .starts = start_flags,
                                .carries = carries.data(),
                                .dy = dy.data(),
                                .dstate_out = in.dstate_out.empty() ? nullptr : dstate_out.data(),
                                .dw_log = dw_log.data(),
                                .dk = dk.data(),
                                .dv = dv.data(),
                                .du = du.data(),
                                .dstate = dstate.data(),
                                .dr = in.r.empty() ? nullptr : dr.data(),
                                .scratch = back_scratch.data()},
          nullptr),
      "wkv4 backward");
  Outputs outputs{y.numbers(),
                  state_out.numbers(),
                  dw_log.numbers(),
                  dk.numbers(),
                  dv.numbers(),
                  du.numbers(),
                  dstate.numbers()};
  if (!in.r.empty()) {
    outputs.push_back(dr.numbers());
  }
  return outputs;
}

// performance.md's gates: twice the error of an emulation, of which rounding the outputs to bf16 is
// most; parameter and state gradients are fp32 either way.
struct Tolerances {
  double y, dk, dv, parameters;
};
template <typename Element>
constexpr Tolerances kUsual = sizeof(Element) == 2 ? Tolerances{2.5e-3, 2.5e-3, 2.5e-3, 1e-4}
                                                   : Tolerances{1e-5, 2e-5, 2e-5, 2e-5};

void expect_matches(const Outputs& actual,
                    const Inputs& in,
                    const Tolerances& tolerances,
                    const std::string& what) {
  SCOPED_TRACE(what + ", B " + std::to_string(in.B) + " T " + std::to_string(in.T) + " A " +
               std::to_string(in.A));
  const Results expected = definition(in, plane_of(actual[kState], 2, in));
  EXPECT_TRUE(close(actual[kY], expected.y, tolerances.y)) << "y";
  EXPECT_TRUE(close(plane_of(actual[kState], 0, in), expected.numerator, tolerances.parameters))
      << "a";
  EXPECT_TRUE(close(plane_of(actual[kState], 1, in), expected.denominator, tolerances.parameters))
      << "b";
  EXPECT_TRUE(close(actual[kDk], expected.dk, tolerances.dk)) << "dk";
  EXPECT_TRUE(close(actual[kDv], expected.dv, tolerances.dv)) << "dv";
  EXPECT_TRUE(close(actual[kDw], expected.dw_log, tolerances.parameters)) << "dw_log";
  EXPECT_TRUE(close(actual[kDu], expected.du, tolerances.parameters)) << "du";
  EXPECT_TRUE(close(plane_of(actual[kDstate], 0, in), expected.da, tolerances.parameters)) << "da";
  EXPECT_TRUE(close(plane_of(actual[kDstate], 1, in), expected.db, tolerances.parameters)) << "db";
  EXPECT_EQ(plane_of(actual[kDstate], 2, in), Numbers(index(in.B * in.A), 0.0)) << "dp";
  if (!in.r.empty()) {
    EXPECT_TRUE(close(actual[kDr], expected.dr, tolerances.dk)) << "dr";
  }
}

enum class Gate { kNone, kSigmoid };

// Decays over the whole range of RWKV-LM's initial values, exp(-5) to exp(3); a state, and a
// gradient of it, as from a sequence before.
template <typename Element>
Inputs random_inputs(int64_t B, int64_t T, int64_t A, Gate gate, double k_scale = 1) {
  Inputs in{.B = B,
            .T = T,
            .A = A,
            .w_log = Numbers(index(A)),
            .k = rounded<Element>(normal(B * T * A, 1, k_scale)),
            .v = rounded<Element>(normal(B * T * A, 2)),
            .u = rounded<float>(normal(A, 3)),
            .state = rounded<float>(normal(B * 3 * A, 4)),
            .r = {},
            .starts = {},
            .dy = rounded<Element>(normal(B * T * A, 5)),
            .dstate_out = rounded<float>(normal(B * 3 * A, 6))};
  for (int64_t c = 0; c < A; ++c) {
    in.w_log[index(c)] = static_cast<float>(-std::exp(
        -5 + 8 * static_cast<double>(c) / std::max<double>(1, static_cast<double>(A) - 1)));
  }
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < A; ++c) {
      double& denominator = in.state[index((b * 3 + 1) * A + c)];
      denominator = static_cast<float>(std::abs(denominator) + 0.5);
    }
  }
  if (gate == Gate::kSigmoid) {
    in.r = rounded<Element>(normal(B * T * A, 7, 2));
  }
  return in;
}

// A state before any token.
void forget(Inputs& in) {
  std::fill(in.state.begin(), in.state.end(), 0.0);
  for (int64_t b = 0; b < in.B; ++b) {
    for (int64_t c = 0; c < in.A; ++c) {
      in.state[index((b * 3 + 2) * in.A + c)] = static_cast<float>(kLogOfNothing);
    }
  }
}

std::string name_of(Wkv4Kernel kernel) {
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return "plain";
    case Wkv4Kernel::kChunkScan:
      return "chunk scan";
    case Wkv4Kernel::kClusterScan:
      return "cluster scan";
  }
  return "?";
}
// Those that take rows of that many channels on this device.
template <typename Element>
std::vector<Wkv4Kernel> kernels_for(const Inputs& in) {
  int major = 0;
  EXPECT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), cudaSuccess);
  std::vector<Wkv4Kernel> kernels{Wkv4Kernel::kPlain, Wkv4Kernel::kChunkScan};
  if (major >= 9 && in.A * static_cast<int64_t>(sizeof(Element)) % 16 == 0) {
    kernels.push_back(Wkv4Kernel::kClusterScan);
  }
  return kernels;
}

// A run, and for kernels whose threads tell each other anything the same in every order.
template <typename Element>
Outputs run_in_every_order(const Inputs& in, Wkv4Kernel kernel) {
  const auto work = [&] { return run<Element>(in, kernel, kernel); };
  return kernel == Wkv4Kernel::kPlain ? work() : same_in_every_order(work);
}

template <typename Element>
class Wkv4KernelTest : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(Wkv4KernelTest, Elements);

// Sub-chunks of 16, tiles of 128 and their edges; rows of one, of odd and of whole pieces; splits
// of T into segments (few channels) and none (three rows).
TYPED_TEST(Wkv4KernelTest, MatchesTheDefinition) {
  struct Case {
    int64_t B, T, A;
    Gate gate;
  };
  const Case cases[] = {{1, 1, 1, Gate::kNone},
                        {3, 15, 63, Gate::kSigmoid},
                        {1, 16, 65, Gate::kNone},
                        {1, 17, 64, Gate::kSigmoid},
                        {3, 63, 8, Gate::kNone},
                        {1, 128, 24, Gate::kSigmoid},
                        {1, 129, 65, Gate::kSigmoid},
                        {3, 129, 32, Gate::kNone},
                        {1, 257, 1, Gate::kSigmoid},
                        {2, 300, 17, Gate::kSigmoid}};
  // More tiles than a cluster has blocks.
  const Inputs longer = random_inputs<TypeParam>(1, 1100, 16, Gate::kNone);
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(longer)) {
    expect_matches(
        run<TypeParam>(longer, kernel, kernel), longer, kUsual<TypeParam>, name_of(kernel));
  }
  for (const auto& [B, T, A, gate] : cases) {
    const Inputs in = random_inputs<TypeParam>(B, T, A, gate);
    for (const Wkv4Kernel kernel : kernels_for<TypeParam>(in)) {
      expect_matches(
          run_in_every_order<TypeParam>(in, kernel), in, kUsual<TypeParam>, name_of(kernel));
    }
  }
}

// The sums are the same, in the same order; but nvcc fuses multiplications and additions as it
// likes in each kernel, so a last bit may differ between two of them.
template <typename Element>
constexpr double kSameSums = sizeof(Element) == 2 ? 1e-4 : 1e-6;

// Few enough channels that T is split, and enough that it is not: on the host runner's 3
// multiprocessors and on an H100's 132 alike.
TYPED_TEST(Wkv4KernelTest, ResultsDoNotDependOnTheBatchOrTheSplit) {
  const int64_t T = 280;
  const int64_t A = 64 / sizeof(TypeParam);
  const int64_t B = 140;
  Inputs one = random_inputs<TypeParam>(1, T, A, Gate::kNone);
  const Outputs alone = run<TypeParam>(one);
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(one)) {
    if (kernel == Wkv4Kernel::kClusterScan) {
      const Outputs shared = run<TypeParam>(one, kernel, kernel);
      for (const Output output : {kY, kState, kDk, kDv, kDstate}) {
        EXPECT_TRUE(close(shared[output], alone[output], kSameSums<TypeParam>)) << output;
      }
    }
  }
  Inputs many = one;
  many.B = B;
  for (Numbers Inputs::*numbers :
       {&Inputs::k, &Inputs::v, &Inputs::state, &Inputs::dy, &Inputs::dstate_out}) {
    (many.*numbers).clear();
    for (int64_t b = 0; b < B; ++b) {
      (many.*numbers).insert((many.*numbers).end(), (one.*numbers).begin(), (one.*numbers).end());
    }
  }
  const Outputs together = run<TypeParam>(many);
  for (const Output output : {kY, kState, kDk, kDv, kDstate}) {
    const Numbers& expected = alone[output];
    for (const size_t b : {size_t{0}, index(B - 1)}) {
      const auto first =
          together[output].begin() + static_cast<std::ptrdiff_t>(b * expected.size());
      const Numbers actual(first, first + static_cast<std::ptrdiff_t>(expected.size()));
      EXPECT_TRUE(close(actual, expected, kSameSums<TypeParam>)) << output;
    }
  }
}

TYPED_TEST(Wkv4KernelTest, ClusterScanRefusesRowsThatAreNoWholePieces) {
  const Inputs in = random_inputs<TypeParam>(1, 20, 33, Gate::kNone);
  const DeviceArray<TypeParam> k(in.k);
  Wkv4Forward<TypeParam> forward{};
  forward.B = 1, forward.T = 20, forward.A = 33;
  forward.k = forward.v = k.data();
  EXPECT_EQ(launch_wkv4(Wkv4Kernel::kClusterScan, forward, nullptr), cudaErrorNotSupported);
  Wkv4Backward<TypeParam> backward{};
  backward.B = 1, backward.T = 20, backward.A = 33;
  backward.k = backward.v = backward.dy = k.data();
  EXPECT_EQ(launch_wkv4_backward(Wkv4Kernel::kClusterScan, backward, nullptr),
            cudaErrorNotSupported);
}

// Any forward kernel may be followed by any backward kernel.
TYPED_TEST(Wkv4KernelTest, KernelsTakeEachOthersCarries) {
  const Inputs in = random_inputs<TypeParam>(1, 300, 40, Gate::kSigmoid);
  for (const Wkv4Kernel forward : kernels_for<TypeParam>(in)) {
    for (const Wkv4Kernel backward : kernels_for<TypeParam>(in)) {
      expect_matches(run<TypeParam>(in, forward, backward),
                     in,
                     kUsual<TypeParam>,
                     name_of(forward) + " then " + name_of(backward));
    }
  }
}

// Without a state and without gradients of it, keys are shifts of a softmax: their gradients sum to
// zero, and a constant added to all of them changes nothing.
TEST(Wkv4Kernel, KeysCountOnlyRelativeToEachOther) {
  Inputs in = random_inputs<float>(1, 300, 36, Gate::kNone);
  forget(in);
  in.dstate_out.clear();
  Inputs shifted = in;
  for (double& k : in.k) {
    k = std::round(k * 64) / 64;
  }
  for (size_t i = 0; i < in.k.size(); ++i) {
    shifted.k[i] = in.k[i] + 32;
  }
  for (const Wkv4Kernel kernel : kernels_for<float>(in)) {
    const Outputs outputs = run<float>(in, kernel, kernel);
    const Outputs other = run<float>(shifted, kernel, kernel);
    EXPECT_TRUE(close(other[kY], outputs[kY], 1e-5)) << name_of(kernel);
    EXPECT_TRUE(close(other[kDk], outputs[kDk], 2e-5)) << name_of(kernel);
    for (int64_t c = 0; c < in.A; ++c) {
      double sum = 0, norm = 0;
      for (int64_t t = 0; t < in.T; ++t) {
        const double dk = outputs[kDk][index(t * in.A + c)];
        sum += dk;
        norm += std::abs(dk);
      }
      EXPECT_LE(std::abs(sum), 1e-5 * norm) << name_of(kernel) << ", channel " << c;
    }
  }
}

// Values of later tokens change nothing at all; keys do within a sub-chunk, whose common scale they
// may move, but by no more than rounding.
TYPED_TEST(Wkv4KernelTest, IsCausal) {
  const int64_t T = 300, A = 33, changed = 200;
  const Inputs in = random_inputs<TypeParam>(1, T, A, Gate::kNone);
  const Outputs before = run<TypeParam>(in);
  Inputs other = in;
  for (int64_t c = 0; c < A; ++c) {
    other.v[index(changed * A + c)] = 100;
  }
  const Outputs after = run<TypeParam>(other);
  EXPECT_TRUE(std::equal(before[kY].begin(), before[kY].begin() + changed * A, after[kY].begin()));
  EXPECT_NE(before[kY], after[kY]);
  for (int64_t c = 0; c < A; ++c) {
    other.k[index(changed * A + c)] = 30;
  }
  const Outputs louder = run<TypeParam>(other);
  const int64_t same = changed / 16 * 16 * A;
  EXPECT_TRUE(std::equal(before[kY].begin(), before[kY].begin() + same, louder[kY].begin()));
  const Numbers early(before[kY].begin(), before[kY].begin() + changed * A);
  const Numbers early_louder(louder[kY].begin(), louder[kY].begin() + changed * A);
  EXPECT_TRUE(close(early_louder, early, kUsual<TypeParam>.y));
}

// What is asked of an output reaches the inputs up to its token.
TYPED_TEST(Wkv4KernelTest, GradientsReachBackOnly) {
  const int64_t T = 300, A = 33, changed = 100;
  const Inputs in = random_inputs<TypeParam>(1, T, A, Gate::kNone);
  Inputs other = in;
  for (int64_t c = 0; c < A; ++c) {
    other.dy[index(changed * A + c)] = 100;
  }
  const Outputs before = run<TypeParam>(in);
  const Outputs after = run<TypeParam>(other);
  for (const Output output : {kDk, kDv}) {
    const auto later = (changed + 1) * A;
    EXPECT_TRUE(std::equal(
        before[output].begin() + later, before[output].end(), after[output].begin() + later))
        << "output " << output;
    EXPECT_NE(before[output], after[output]) << "output " << output;
  }
}

// Both paths, and their mixture within a warp: keys whose spread a common scale can and cannot
// hold.
TEST(Wkv4Kernel, HoldsForKeysOfAnySpread) {
  struct Spread {
    double k_scale;
    Tolerances tolerances;
  };
  // A sum's scale is rounded to 2^-24 of its size, by the plain kernel at every token; and where a
  // common scale does not hold them, so are products of keys.
  for (const auto& [k_scale, tolerances] : {Spread{4, {1e-5, 2e-5, 2e-5, 1e-4}},
                                            Spread{16, {1e-3, 2e-3, 1e-3, 1e-3}},
                                            Spread{40, {2e-3, 2e-2, 7e-3, 7e-3}}}) {
    const Inputs in = random_inputs<float>(1, 290, 20, Gate::kSigmoid, k_scale);
    for (const Wkv4Kernel kernel : kernels_for<float>(in)) {
      expect_matches(run<float>(in, kernel, kernel),
                     in,
                     tolerances,
                     name_of(kernel) + ", k of " + std::to_string(k_scale));
    }
  }
}

TYPED_TEST(Wkv4KernelTest, HoldsForASpikeAndForEqualKeys) {
  const int64_t T = 290, A = 32;
  Inputs spike = random_inputs<TypeParam>(1, T, A, Gate::kNone);
  Inputs equal = spike;
  Inputs zero = spike;
  Inputs deep = spike;
  for (int64_t c = 0; c < A; ++c) {
    spike.k[index(70 * A + c)] = 60;
  }
  for (size_t i = 0; i < equal.k.size(); ++i) {
    equal.k[i] = -7;
    zero.k[i] = i % 2 == 0 ? -0.0 : 0.0;
    zero.v[i] = i % 3 == 0 ? -0.0 : 0.0;
    // A deep valley between two plains: adjoints come out of it too large for the plain's scale.
    deep.k[i] += i / index(A) / 40 % 2 == 0 ? 0 : -100;
  }
  deep.k = rounded<TypeParam>(deep.k);
  // Scales of 100 are rounded to 2^-18, by the plain kernel at every token.
  const Tolerances spiked = sizeof(TypeParam) == 2 ? Tolerances{2.5e-3, 2.5e-3, 2.5e-3, 1e-3}
                                                   : Tolerances{1e-4, 2e-4, 2e-4, 1e-3};
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(equal)) {
    const auto expect = [&](const Inputs& in, const Tolerances& tolerances, const char* what) {
      expect_matches(
          run<TypeParam>(in, kernel, kernel), in, tolerances, name_of(kernel) + ", " + what);
    };
    expect(spike, spiked, "spike");
    expect(equal, kUsual<TypeParam>, "equal");
    expect(zero, kUsual<TypeParam>, "zero");
    expect(deep, spiked, "deep");
  }
}

// The ends of what RWKV-LM's initial values span: e^w = 2e-9 and 0.993.
TEST(Wkv4Kernel, HoldsAtBothEndsOfTheDecay) {
  for (const double w_log : {-std::exp(3.0), -std::exp(-5.0)}) {
    Inputs in = random_inputs<float>(1, 290, 16, Gate::kNone);
    std::fill(in.w_log.begin(), in.w_log.end(), static_cast<float>(w_log));
    for (const Wkv4Kernel kernel : kernels_for<float>(in)) {
      expect_matches(run<float>(in, kernel, kernel), in, kUsual<float>, name_of(kernel));
    }
  }
}

// Bonuses that would overflow, or hide every own token, in a common scale.
TEST(Wkv4Kernel, HoldsForBonusesOfAnySize) {
  Inputs in = random_inputs<float>(1, 160, 36, Gate::kNone);
  for (int64_t c = 0; c < in.A; ++c) {
    in.u[index(c)] = c % 3 == 0 ? 70 : c % 3 == 1 ? -70 : 0;
  }
  for (const Wkv4Kernel kernel : kernels_for<float>(in)) {
    expect_matches(run<float>(in, kernel, kernel), in, {1e-5, 1e-4, 1e-4, 1e-4}, name_of(kernel));
  }
}

TYPED_TEST(Wkv4KernelTest, TwoSequencesWithTheStateHandedOverAreOne) {
  const int64_t T = 300, A = 40, cut = 171;
  Inputs whole = random_inputs<TypeParam>(1, T, A, Gate::kSigmoid);
  // A gradient of a and b means another thing where p is another.
  whole.dstate_out.clear();
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(whole)) {
    const Outputs expected = run<TypeParam>(whole, kernel, kernel);
    Inputs left = whole, right = whole;
    left.T = cut;
    right.T = T - cut;
    for (Numbers Inputs::*numbers : {&Inputs::k, &Inputs::v, &Inputs::r, &Inputs::dy}) {
      (left.*numbers).resize(index(cut * A));
      Numbers& rest = right.*numbers;
      rest.erase(rest.begin(), rest.begin() + cut * A);
    }
    right.state = run<TypeParam>(left, kernel, kernel)[kState];
    const Outputs second = run<TypeParam>(right, kernel, kernel);
    left.dstate_out = second[kDstate];
    const Outputs first = run<TypeParam>(left, kernel, kernel);
    for (const Output output : {kY, kDk, kDv, kDr}) {
      Numbers joined = first[output];
      joined.insert(joined.end(), second[output].begin(), second[output].end());
      EXPECT_TRUE(close(joined, expected[output], kUsual<TypeParam>.dk))
          << name_of(kernel) << ", output " << output;
    }
    EXPECT_TRUE(close(first[kDstate], expected[kDstate], 2e-5)) << name_of(kernel);
  }
}

// Starts at a row's first token, within sub-chunks, at edges of sub-chunks and tiles, at neighbours
// and at the last token.
TYPED_TEST(Wkv4KernelTest, DocumentsAreAsIfAlone) {
  const int64_t B = 2, T = 420, A = 16;
  Inputs in = random_inputs<TypeParam>(B, T, A, Gate::kSigmoid);
  in.starts = Numbers(index(B * T), 0.0);
  for (const int64_t t :
       {int64_t{5}, int64_t{16}, int64_t{128}, int64_t{131}, int64_t{132}, int64_t{200}, T - 1}) {
    in.starts[index(t)] = 1;
  }
  for (const int64_t t : {int64_t{0}, int64_t{255}, int64_t{256}}) {
    in.starts[index(T + t)] = 1;
  }
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(in)) {
    expect_matches(
        run_in_every_order<TypeParam>(in, kernel), in, kUsual<TypeParam>, name_of(kernel));
  }
}

// A NaN spoils its own document and no other.
TYPED_TEST(Wkv4KernelTest, NotEvenNanCrossesAStart) {
  const int64_t T = 300, A = 16, begin = 140, end = 150;
  Inputs in = random_inputs<TypeParam>(1, T, A, Gate::kNone);
  in.starts = Numbers(index(T), 0.0);
  in.starts[index(begin)] = in.starts[index(end)] = 1;
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(in)) {
    const Outputs clean = run<TypeParam>(in, kernel, kernel);
    Inputs spoilt = in;
    for (int64_t c = 0; c < A; ++c) {
      const size_t at = index((begin + 3) * A + c);
      spoilt.k[at] = spoilt.dy[at] = std::nan("");
    }
    const Outputs outputs = run<TypeParam>(spoilt, kernel, kernel);
    EXPECT_TRUE(std::isnan(outputs[kY][index((end - 1) * A)])) << name_of(kernel);
    for (const Output output : {kY, kDk, kDv}) {
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t c = 0; c < A && (t < begin || t >= end); ++c) {
          ASSERT_EQ(outputs[output][index(t * A + c)], clean[output][index(t * A + c)])
              << name_of(kernel) << ", output " << output << ", token " << t;
        }
      }
    }
    EXPECT_EQ(outputs[kState], clean[kState]) << name_of(kernel);
    EXPECT_EQ(outputs[kDstate], clean[kDstate]) << name_of(kernel);
  }
}

// An initial state has no gradient: it stands for nothing.
TEST(Wkv4Kernel, AnInitialStateIsNothing) {
  Inputs in = random_inputs<float>(2, 40, 36, Gate::kNone);
  forget(in);
  for (const Wkv4Kernel kernel : kernels_for<float>(in)) {
    const Outputs outputs = run<float>(in, kernel, kernel);
    expect_matches(outputs, in, kUsual<float>, name_of(kernel));
    EXPECT_EQ(outputs[kDstate], Numbers(outputs[kDstate].size(), 0.0)) << name_of(kernel);
  }
}

TYPED_TEST(Wkv4KernelTest, NoTokensHandTheStateOn) {
  const Inputs in = random_inputs<TypeParam>(2, 0, 33, Gate::kNone);
  Inputs without = in;
  without.dstate_out.clear();
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(in)) {
    const Outputs outputs = run<TypeParam>(in, kernel, kernel);
    EXPECT_EQ(outputs[kState], in.state);
    EXPECT_EQ(outputs[kDstate], in.dstate_out);
    EXPECT_EQ(outputs[kDw], Numbers(33, 0.0));
    EXPECT_EQ(outputs[kDu], Numbers(33, 0.0));
    EXPECT_EQ(run<TypeParam>(without, kernel, kernel)[kDstate], Numbers(in.state.size(), 0.0));
  }
}

TYPED_TEST(Wkv4KernelTest, NoSequencesHaveNoGradients) {
  const Inputs in = random_inputs<TypeParam>(0, 20, 33, Gate::kNone);
  for (const Wkv4Kernel kernel : kernels_for<TypeParam>(in)) {
    const Outputs outputs = run<TypeParam>(in, kernel, kernel);
    EXPECT_EQ(outputs[kDw], Numbers(33, 0.0));
    EXPECT_EQ(outputs[kDu], Numbers(33, 0.0));
  }
}

}  // namespace
}  // namespace rwkv::test
