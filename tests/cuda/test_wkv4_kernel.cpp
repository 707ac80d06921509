// wkv4's kernels against the recurrence in float64, against each other and against what must hold
// of any correct one.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/wkv4_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

constexpr double kLogOfNothing = -1e38;

// ---- Problems -----------------------------------------------------------------------------------

struct Shape {
  int64_t batch_size;
  int64_t seq_len;
  int64_t dim_att;
};

// Inputs of forward and backward; empty where an optional one is not given.
struct Problem {
  Shape shape;
  Numbers w_log{}, k{}, v{}, u{}, state{}, r{}, starts{}, dy{}, dstate_out{};

  int64_t tokens() const { return shape.batch_size * shape.seq_len; }
  int64_t state_size() const { return shape.batch_size * 3 * shape.dim_att; }
};

bool is_start(const Problem& problem, int64_t b, int64_t t) {
  return !problem.starts.empty() &&
         problem.starts[static_cast<size_t>(b * problem.shape.seq_len + t)] != 0;
}

enum class Gate { kWithout, kWith };
enum class State { kInitial, kGiven };

Numbers initial_state(Shape shape) {
  Numbers state(static_cast<size_t>(shape.batch_size * 3 * shape.dim_att));
  for (size_t i = 0; i < state.size(); ++i) {
    state[i] = static_cast<int64_t>(i) / shape.dim_att % 3 == 2 ? kLogOfNothing : 0.0;
  }
  return state;
}

// Random numbers as `Element` holds them. Decays go over the whole range of initial values of
// RWKV-LM, from 0.993 in the first channel to 2e-9 in the last.
template <typename Element>
Problem random_problem(Shape shape,
                       Gate gate = Gate::kWithout,
                       State state = State::kInitial,
                       double k_scale = 1) {
  const int64_t channels = shape.dim_att;
  const int64_t size = shape.batch_size * shape.seq_len * channels;
  Problem problem{.shape = shape,
                  .k = rounded<Element>(normal(size, 1, k_scale)),
                  .v = rounded<Element>(normal(size, 2)),
                  .u = rounded<float>(normal(channels, 3)),
                  .state = initial_state(shape),
                  .dy = rounded<Element>(normal(size, 4))};
  for (int64_t c = 0; c < channels; ++c) {
    const double place =
        channels == 1 ? 0.3 : static_cast<double>(c) / static_cast<double>(channels - 1);
    problem.w_log.push_back(-std::exp(-5 + 8 * place));
  }
  problem.w_log = rounded<float>(problem.w_log);
  if (gate == Gate::kWith) {
    problem.r = rounded<Element>(normal(size, 5, 2));
  }
  if (state == State::kGiven) {
    problem.state = normal(problem.state_size(), 6);
    for (size_t i = 0; i < problem.state.size(); ++i) {
      // A denominator is positive.
      if (static_cast<int64_t>(i) / channels % 3 == 1) {
        problem.state[i] = 0.5 + std::abs(problem.state[i]);
      }
    }
    problem.state = rounded<float>(problem.state);
    problem.dstate_out = rounded<float>(normal(problem.state_size(), 7));
  }
  return problem;
}

// ---- The kernels --------------------------------------------------------------------------------

struct Result {
  Numbers y, state_out, carries;
  Numbers dw, dk, dv, du, dstate, dr;
};

int compute_capability_major() {
  int device = 0, major = 0;
  EXPECT_EQ(cudaGetDevice(&device), cudaSuccess);
  EXPECT_EQ(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), cudaSuccess);
  return major;
}

template <typename Element>
bool is_supported(Wkv4Kernel kernel, Shape shape) {
  return kernel != Wkv4Kernel::kClusterScan ||
         (compute_capability_major() >= 9 &&
          shape.dim_att * static_cast<int64_t>(sizeof(Element)) % 16 == 0);
}

template <typename Element>
const Element* or_null(const DeviceArray<Element>& array) {
  return array.size() == 0 ? nullptr : array.data();
}

// Forward with one kernel, then backward with another, or the same.
template <typename Element>
Result run(Wkv4Kernel forward, Wkv4Kernel backward, const Problem& problem) {
  const auto [batch_size, seq_len, dim_att] = problem.shape;
  const int64_t size = problem.tokens() * dim_att;
  const DeviceArray<float> w_log(problem.w_log), u(problem.u), state(problem.state),
      dstate_out(problem.dstate_out);
  const DeviceArray<Element> k(problem.k), v(problem.v), r(problem.r), dy(problem.dy);
  const DeviceArray<uint8_t> starts(problem.starts);
  DeviceArray<Element> y(size), dk(size), dv(size), dr(r.size());
  DeviceArray<float> state_out(problem.state_size()),
      carries(batch_size * wkv4_num_carries(seq_len) * 3 * dim_att), dw(dim_att), du(dim_att),
      dstate(problem.state_size());
  DeviceArray<float> forward_scratch(
      wkv4_scratch_floats(forward, Wkv4Pass::kForward, batch_size, seq_len, dim_att));
  DeviceArray<float> backward_scratch(
      wkv4_scratch_floats(backward, Wkv4Pass::kBackward, batch_size, seq_len, dim_att));

  const Wkv4Inputs<Element> in{.batch_size = batch_size,
                               .seq_len = seq_len,
                               .dim_att = dim_att,
                               .w_log = w_log.data(),
                               .k = k.data(),
                               .v = v.data(),
                               .u = u.data(),
                               .state = state.data(),
                               .r = or_null(r),
                               .starts = reinterpret_cast<const bool*>(or_null(starts))};
  expect_launched(launch_wkv4(forward,
                              Wkv4Forward<Element>{.in = in,
                                                   .y = y.data(),
                                                   .state_out = state_out.data(),
                                                   .carries = carries.data(),
                                                   .scratch = forward_scratch.data()},
                              nullptr),
                  "wkv4");
  expect_launched(
      launch_wkv4_backward(backward,
                           Wkv4Backward<Element>{.in = in,
                                                 .carries = carries.data(),
                                                 .dy = dy.data(),
                                                 .dstate_out = or_null(dstate_out),
                                                 .dw = dw.data(),
                                                 .dk = dk.data(),
                                                 .dv = dv.data(),
                                                 .du = du.data(),
                                                 .dstate = dstate.data(),
                                                 .dr = dr.size() == 0 ? nullptr : dr.data(),
                                                 .scratch = backward_scratch.data()},
                           nullptr),
      "wkv4 backward");
  return {y.numbers(),
          state_out.numbers(),
          carries.numbers(),
          dw.numbers(),
          dk.numbers(),
          dv.numbers(),
          du.numbers(),
          dstate.numbers(),
          dr.numbers()};
}

// The same bits in every order of its threads.
template <typename Element>
Result run_in_every_order(Wkv4Kernel kernel, const Problem& problem) {
  Result result;
  same_in_every_order([&] {
    result = run<Element>(kernel, kernel, problem);
    return Outputs{result.y,
                   result.state_out,
                   result.carries,
                   result.dw,
                   result.dk,
                   result.dv,
                   result.du,
                   result.dstate,
                   result.dr};
  });
  return result;
}

// ---- The definition -----------------------------------------------------------------------------

// The recurrence of model/ops/wkv4.h in float64 without any scaling: its range takes k up to some
// hundreds. The gradient of the final state is one of a and b in units of the p that the kernel
// chose for it, so that p is taken from the kernel.
struct Reference {
  Numbers y;
  Numbers num, den;  // A and B, [B, T + 1, A]: before each token, and after the last
  Numbers dw, dk, dv, du, dstate, dr;
};

Reference reference(const Problem& problem, const Numbers& kernel_state_out) {
  const auto [batch_size, seq_len, dim_att] = problem.shape;
  const auto size = static_cast<size_t>(problem.tokens() * dim_att);
  Reference result{.y = Numbers(size),
                   .num = Numbers(static_cast<size_t>(batch_size * (seq_len + 1) * dim_att)),
                   .den = result.num,
                   .dw = Numbers(static_cast<size_t>(dim_att)),
                   .dk = Numbers(size),
                   .dv = Numbers(size),
                   .du = Numbers(static_cast<size_t>(dim_att)),
                   .dstate = Numbers(problem.state.size()),
                   .dr = Numbers(problem.r.size())};
  for (int64_t b = 0; b < batch_size; ++b) {
    for (int64_t c = 0; c < dim_att; ++c) {
      const auto at = [&](int64_t t) {
        return static_cast<size_t>((b * seq_len + t) * dim_att + c);
      };
      const auto state_at = [&](int64_t row) {
        return static_cast<size_t>((b * 3 + row) * dim_att + c);
      };
      const auto before = [&](int64_t t) {
        return static_cast<size_t>((b * (seq_len + 1) + t) * dim_att + c);
      };
      const auto starts = [&](int64_t t) { return is_start(problem, b, t); };
      const auto gate = [&](int64_t t) {
        return problem.r.empty() ? 1.0 : 1 / (1 + std::exp(-problem.r[at(t)]));
      };
      const auto channel = static_cast<size_t>(c);
      const double decay = std::exp(problem.w_log[channel]), u = problem.u[channel];

      const double unit_in = std::exp(problem.state[state_at(2)]);
      double num = problem.state[state_at(0)] * unit_in;
      double den = problem.state[state_at(1)] * unit_in;
      for (int64_t t = 0; t < seq_len; ++t) {
        if (starts(t)) {
          num = den = 0;
        }
        result.num[before(t)] = num;
        result.den[before(t)] = den;
        const double k = problem.k[at(t)], v = problem.v[at(t)];
        result.y[at(t)] = gate(t) * (num + std::exp(u + k) * v) / (den + std::exp(u + k));
        num = decay * num + std::exp(k) * v;
        den = decay * den + std::exp(k);
      }
      result.num[before(seq_len)] = num;
      result.den[before(seq_len)] = den;

      double al = 0, be = 0;
      if (!problem.dstate_out.empty()) {
        const double unit_out = std::exp(-kernel_state_out[state_at(2)]);
        al = problem.dstate_out[state_at(0)] * unit_out;
        be = -problem.dstate_out[state_at(1)] * unit_out;
      }
      for (int64_t t = seq_len - 1; t >= 0; --t) {
        const double k = problem.k[at(t)], v = problem.v[at(t)];
        const double bonus = std::exp(u + k);
        const double denominator = result.den[before(t)] + bonus;
        const double y = (result.num[before(t)] + bonus * v) / denominator;
        const double dy = problem.dy[at(t)] * gate(t);
        if (!problem.r.empty()) {
          result.dr[at(t)] = dy * y * (1 - gate(t));
        }
        const double s = dy / denominator;
        result.dv[at(t)] = bonus * s + std::exp(k) * al;
        result.dk[at(t)] = bonus * s * (v - y) + std::exp(k) * (al * v - be);
        result.du[channel] += bonus * s * (v - y);
        result.dw[channel] += decay * (result.num[before(t)] * al - result.den[before(t)] * be);
        al = starts(t) ? 0 : decay * al + s;
        be = starts(t) ? 0 : decay * be + s * y;
      }
      result.dstate[state_at(0)] = al * unit_in;
      result.dstate[state_at(1)] = -be * unit_in;
    }
  }
  return result;
}

// ---- Comparing ----------------------------------------------------------------------------------

// Relative errors allowed, L2 over a tensor; five times that in any one channel.
struct Tolerance {
  double y, dk, dv, sums;
};
// fp32: twice the error of the tiled algorithm in float32, with the range of decays above.
// bf16: the rounding of outputs, 2^-8 at most; dw and du are fp32.
template <typename Element>
constexpr Tolerance kTolerance = sizeof(Element) == 2 ? Tolerance{4e-3, 4e-3, 4e-3, 1e-4}
                                                      : Tolerance{1e-5, 2e-5, 2e-5, 2e-5};

// `rows` of `channels` numbers each.
testing::AssertionResult close_by_channel(const Numbers& actual,
                                          const Numbers& expected,
                                          int64_t channels,
                                          double relative) {
  const testing::AssertionResult whole = close(actual, expected, relative);
  if (!whole) {
    return whole;
  }
  for (size_t c = 0; c < static_cast<size_t>(channels); ++c) {
    Numbers actual_channel, expected_channel;
    for (size_t i = c; i < actual.size(); i += static_cast<size_t>(channels)) {
      actual_channel.push_back(actual[i]);
      expected_channel.push_back(expected[i]);
    }
    testing::AssertionResult one = close(actual_channel, expected_channel, 5 * relative);
    if (!one) {
      return one << "; channel " << c;
    }
  }
  return testing::AssertionSuccess();
}

// A state of row b and channel c, rows a, b, p with units of e^p or 2^p, against A and B. Both as
// shares of the B expected, so that every channel counts the same.
class StateComparison {
 public:
  StateComparison(double unit_base, int64_t channels)
      : unit_base_(unit_base), channels_(channels) {}

  void add(const Numbers& states, int64_t state, int64_t channel, double num, double den) {
    const auto a = static_cast<size_t>(state * 3 * channels_ + channel);
    const auto stride = static_cast<size_t>(channels_);
    // Of a state without tokens there is no share.
    const double whole = den == 0 ? 1 : den;
    const double unit = std::pow(unit_base_, states[a + 2 * stride]) / whole;
    actual_.insert(actual_.end(), {states[a] * unit, states[a + stride] * unit});
    expected_.insert(expected_.end(), {num / whole, den / whole});
  }
  testing::AssertionResult close_within(double relative) const {
    return close(actual_, expected_, relative);
  }

 private:
  double unit_base_;
  int64_t channels_;
  Numbers actual_, expected_;
};

void expect_states(const Problem& problem,
                   const Reference& expected,
                   const Result& actual,
                   double relative) {
  const auto [batch_size, seq_len, dim_att] = problem.shape;
  const int64_t num_carries = wkv4_num_carries(seq_len);
  StateComparison carries(2, dim_att), state_out(std::exp(1), dim_att);
  for (int64_t b = 0; b < batch_size; ++b) {
    for (int64_t i = 0; i < num_carries; ++i) {
      const int64_t t = std::min(i * kWkv4CarryTokens, seq_len);
      if (t < seq_len && is_start(problem, b, t)) {
        // What came before it may be in the carry or not.
        continue;
      }
      for (int64_t c = 0; c < dim_att; ++c) {
        const auto at = static_cast<size_t>((b * (seq_len + 1) + t) * dim_att + c);
        carries.add(actual.carries, b * num_carries + i, c, expected.num[at], expected.den[at]);
        if (t == seq_len) {
          state_out.add(actual.state_out, b, c, expected.num[at], expected.den[at]);
        }
      }
    }
  }
  EXPECT_TRUE(carries.close_within(relative)) << "carries";
  EXPECT_TRUE(state_out.close_within(relative)) << "state_out";
}

void expect_matches(const Problem& problem, const Result& actual, Tolerance tolerance) {
  const auto [batch_size, seq_len, dim_att] = problem.shape;
  SCOPED_TRACE("B" + std::to_string(batch_size) + " T" + std::to_string(seq_len) + " A" +
               std::to_string(dim_att) + (problem.r.empty() ? "" : " gate") +
               (problem.starts.empty() ? "" : " starts") +
               (problem.dstate_out.empty() ? "" : " state"));
  const Reference expected = reference(problem, actual.state_out);
  EXPECT_TRUE(close_by_channel(actual.y, expected.y, dim_att, tolerance.y)) << "y";
  EXPECT_TRUE(close_by_channel(actual.dk, expected.dk, dim_att, tolerance.dk)) << "dk";
  EXPECT_TRUE(close_by_channel(actual.dv, expected.dv, dim_att, tolerance.dv)) << "dv";
  EXPECT_TRUE(close_by_channel(actual.dr, expected.dr, dim_att, tolerance.y)) << "dr";
  EXPECT_TRUE(close(actual.dw, expected.dw, tolerance.sums)) << "dw";
  EXPECT_TRUE(close(actual.du, expected.du, tolerance.sums)) << "du";
  // States and their gradients are fp32 whatever the element.
  EXPECT_TRUE(close(actual.dstate, expected.dstate, tolerance.sums)) << "dstate";
  expect_states(problem, expected, actual, tolerance.sums);
}

// ---- Tests of each kernel and element type ------------------------------------------------------

template <Wkv4Kernel kWhich, typename ElementType>
struct Case {
  static constexpr Wkv4Kernel kKernel = kWhich;
  using Element = ElementType;
};
struct CaseName {
  template <typename Tested>
  static std::string GetName(int) {
    const char* kernel = Tested::kKernel == Wkv4Kernel::kPlain       ? "Plain"
                         : Tested::kKernel == Wkv4Kernel::kChunkScan ? "ChunkScan"
                                                                     : "ClusterScan";
    return kernel + ("_" + element_name<typename Tested::Element>());
  }
};
constexpr Wkv4Kernel kKernels[] = {Wkv4Kernel::kPlain};
using Cases =
    testing::Types<Case<Wkv4Kernel::kPlain, float>, Case<Wkv4Kernel::kPlain, __nv_bfloat16>>;

template <typename Tested>
class Wkv4KernelTest : public testing::Test {
 protected:
  using Element = typename Tested::Element;
  static constexpr Wkv4Kernel kKernel = Tested::kKernel;
  static constexpr Tolerance kAllowed = kTolerance<Element>;

  // Some kernels cannot do unaligned rows, or any without an sm_90.
  static bool can(Shape shape) { return is_supported<Element>(kKernel, shape); }
  static Problem random(Shape shape,
                        Gate gate = Gate::kWithout,
                        State state = State::kInitial,
                        double k_scale = 1) {
    return random_problem<Element>(shape, gate, state, k_scale);
  }
  static Result run_kernel(const Problem& problem) {
    return run<Element>(kKernel, kKernel, problem);
  }
};
TYPED_TEST_SUITE(Wkv4KernelTest, Cases, CaseName);

// Sub-chunks of 16, tiles of 128 and more than one of them, whole and not; channels likewise. The
// number of batch rows changes how a kernel divides T.
constexpr Shape kShapes[] = {{1, 1, 1},
                             {3, 1, 65},
                             {3, 15, 63},
                             {1, 16, 64},
                             {3, 17, 8},
                             {1, 63, 65},
                             {1, 128, 72},
                             {3, 129, 64},
                             {1, 257, 1},
                             {1, 257, 136},
                             {2, 2, 768}};

TYPED_TEST(Wkv4KernelTest, MatchesTheRecurrence) {
  for (const Shape shape : kShapes) {
    for (const Gate gate : {Gate::kWithout, Gate::kWith}) {
      if (this->can(shape)) {
        // With no state y of one token is v: gradients of k and u would be rounding alone.
        const bool given = gate == Gate::kWith || shape.seq_len == 1;
        const Problem problem = this->random(shape, gate, given ? State::kGiven : State::kInitial);
        expect_matches(problem,
                       run_in_every_order<typename TypeParam::Element>(TypeParam::kKernel, problem),
                       this->kAllowed);
      }
    }
  }
}

TYPED_TEST(Wkv4KernelTest, LongSequencesMatchTheRecurrence) {
  const Shape shape{1, 1665, 8};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const Problem problem = this->random(shape, Gate::kWithout, State::kGiven);
  expect_matches(problem,
                 run_in_every_order<typename TypeParam::Element>(TypeParam::kKernel, problem),
                 this->kAllowed);
}

// Of the exponents that k spans, fp32 keeps fewer digits the larger they are.
TYPED_TEST(Wkv4KernelTest, KeysOfAnySizeMatchTheRecurrence) {
  const Shape shape{1, 257, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const struct {
    double k_scale;
    Tolerance fp32;
  } kScales[] = {{4, {1e-5, 2e-5, 2e-5, 2e-5}},
                 {16, {1e-3, 2e-3, 1e-3, 1e-3}},
                 {40, {2e-3, 2e-2, 7e-3, 7e-3}}};
  for (const auto& [k_scale, fp32] : kScales) {
    SCOPED_TRACE("k of standard deviation " + std::to_string(k_scale));
    const Tolerance allowed{std::max(fp32.y, this->kAllowed.y),
                            std::max(fp32.dk, this->kAllowed.dk),
                            std::max(fp32.dv, this->kAllowed.dv),
                            std::max(fp32.sums, this->kAllowed.sums)};
    const Problem problem = this->random(shape, Gate::kWith, State::kGiven, k_scale);
    expect_matches(problem,
                   run_in_every_order<typename TypeParam::Element>(TypeParam::kKernel, problem),
                   allowed);
  }
}

TYPED_TEST(Wkv4KernelTest, OneKeyAboveAllOthersMatchesTheRecurrence) {
  const Shape shape{2, 145, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  for (const int64_t spike : {0, 15, 16, 130, 144}) {
    Problem problem = this->random(shape, Gate::kWithout, State::kGiven);
    for (int64_t c = 0; c < shape.dim_att; ++c) {
      problem.k[static_cast<size_t>(spike * shape.dim_att + c)] = 60;
    }
    // Adjoints behind the spike are differences of numbers of its size.
    const Tolerance allowed{std::max(2e-5, this->kAllowed.y),
                            std::max(1e-4, this->kAllowed.dk),
                            std::max(1e-4, this->kAllowed.dv),
                            std::max(1e-4, this->kAllowed.sums)};
    expect_matches(problem, this->run_kernel(problem), allowed);
  }
}

TYPED_TEST(Wkv4KernelTest, EqualKeysAndZerosMatchTheRecurrence) {
  const Shape shape{1, 145, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const Problem random = this->random(shape, Gate::kWith);
  for (const double k : {0.0, -0.0, 1.5, -88.0, 88.0}) {
    Problem problem = random;
    std::fill(problem.k.begin(), problem.k.end(), k);
    expect_matches(problem, this->run_kernel(problem), this->kAllowed);
    std::fill(problem.v.begin(), problem.v.end(), -0.0);
    const Result result = this->run_kernel(problem);
    const Numbers zeros(problem.v.size());
    EXPECT_TRUE(close(result.y, zeros, 0));
    EXPECT_TRUE(close(result.dk, zeros, 0));
    EXPECT_TRUE(close(result.dr, zeros, 0));
  }
}

// Adding a number to every k of a row changes nothing, so the gradients of its ks cancel.
TYPED_TEST(Wkv4KernelTest, GradientsOfKeysCancelOverTime) {
  const Shape shape{2, 257, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const Problem problem = this->random(shape, Gate::kWith);
  const Numbers dk = this->run_kernel(problem).dk;
  const int64_t per_row = shape.seq_len * shape.dim_att;
  for (int64_t b = 0; b < shape.batch_size; ++b) {
    for (int64_t c = 0; c < shape.dim_att; ++c) {
      double sum = 0, squares = 0;
      for (int64_t i = c; i < per_row; i += shape.dim_att) {
        const double number = dk[static_cast<size_t>(b * per_row + i)];
        sum += number;
        squares += number * number;
      }
      // Independent roundings of `per_row` numbers.
      EXPECT_LE(std::abs(sum), 4 * this->kAllowed.dk * std::sqrt(squares))
          << "row " << b << ", channel " << c;
    }
  }
}

TYPED_TEST(Wkv4KernelTest, ATokenDoesNotReachEarlierOnes) {
  const Shape shape{1, 273, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const Problem problem = this->random(shape, Gate::kWith, State::kGiven);
  const Numbers y = this->run_kernel(problem).y;
  for (const int64_t token : {1, 15, 16, 100, 128, 272}) {
    Problem changed = problem;
    const auto first = static_cast<size_t>(token * shape.dim_att);
    for (size_t i = first; i < changed.k.size(); ++i) {
      changed.k[i] = changed.v[i] = changed.r[i] = i % 3 == 0 ? 20 : -3;
    }
    const Numbers changed_y = this->run_kernel(changed).y;
    EXPECT_TRUE(std::equal(y.begin(), y.begin() + static_cast<ptrdiff_t>(first), changed_y.begin()))
        << "token " << token << " reached one before it";
    EXPECT_NE(y, changed_y);
  }
}

// Tokens [begin, end) of each row of a [B, T, per_token] array.
Numbers tokens_of(const Numbers& numbers, Shape shape, int64_t begin, int64_t end) {
  Numbers result;
  if (numbers.empty()) {
    return result;
  }
  const int64_t per_token =
      static_cast<int64_t>(numbers.size()) / (shape.batch_size * shape.seq_len);
  for (int64_t b = 0; b < shape.batch_size; ++b) {
    const auto row = numbers.begin() + static_cast<ptrdiff_t>(b * shape.seq_len * per_token);
    result.insert(result.end(), row + begin * per_token, row + end * per_token);
  }
  return result;
}

Problem part_of(const Problem& problem, int64_t begin, int64_t end) {
  const Shape shape = problem.shape;
  Problem part = problem;
  part.shape.seq_len = end - begin;
  for (Numbers Problem::*tokens :
       {&Problem::k, &Problem::v, &Problem::r, &Problem::starts, &Problem::dy}) {
    part.*tokens = tokens_of(problem.*tokens, shape, begin, end);
  }
  return part;
}

TYPED_TEST(Wkv4KernelTest, TwoPartsWithTheStateHandedOverAreTheWhole) {
  const Shape shape{2, 290, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  const Problem problem = this->random(shape, Gate::kWith, State::kGiven);
  const Result whole = this->run_kernel(problem);
  for (const int64_t cut : {1, 16, 128, 201}) {
    SCOPED_TRACE(cut);
    Problem first = part_of(problem, 0, cut), second = part_of(problem, cut, shape.seq_len);
    second.state = this->run_kernel(first).state_out;
    const Result after = this->run_kernel(second);
    first.dstate_out = after.dstate;
    const Result before = this->run_kernel(first);
    const auto expect_parts = [&](Numbers Result::*tokens, double relative) {
      EXPECT_TRUE(close(before.*tokens, tokens_of(whole.*tokens, shape, 0, cut), relative));
      EXPECT_TRUE(
          close(after.*tokens, tokens_of(whole.*tokens, shape, cut, shape.seq_len), relative));
    };
    expect_parts(&Result::y, this->kAllowed.y);
    expect_parts(&Result::dk, this->kAllowed.dk);
    expect_parts(&Result::dv, this->kAllowed.dv);
    expect_parts(&Result::dr, this->kAllowed.y);
    EXPECT_TRUE(close(before.dstate, whole.dstate, kTolerance<float>.sums));
    Numbers dw, du;
    for (size_t c = 0; c < whole.dw.size(); ++c) {
      dw.push_back(before.dw[c] + after.dw[c]);
      du.push_back(before.du[c] + after.du[c]);
    }
    EXPECT_TRUE(close(dw, whole.dw, kTolerance<float>.sums));
    EXPECT_TRUE(close(du, whole.du, kTolerance<float>.sums));
  }
}

// ---- Documents ----------------------------------------------------------------------------------

// True at the given tokens of every row but the last, which is one document.
Numbers starts_at(Shape shape, std::initializer_list<int64_t> tokens) {
  Numbers starts(static_cast<size_t>(shape.batch_size * shape.seq_len));
  for (int64_t b = 0; b + 1 < shape.batch_size; ++b) {
    for (const int64_t t : tokens) {
      starts[static_cast<size_t>(b * shape.seq_len + t)] = 1;
    }
  }
  return starts;
}

TYPED_TEST(Wkv4KernelTest, DocumentStartsMatchTheRecurrence) {
  const Shape shape{3, 290, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  for (const auto& tokens :
       {std::initializer_list<int64_t>{0}, {1, 16, 17, 31}, {128, 256}, {0, 5, 127, 129, 289}}) {
    Problem problem = this->random(shape, Gate::kWith, State::kGiven);
    problem.starts = starts_at(shape, tokens);
    expect_matches(problem,
                   run_in_every_order<typename TypeParam::Element>(TypeParam::kKernel, problem),
                   this->kAllowed);
  }
}

TYPED_TEST(Wkv4KernelTest, NothingCrossesADocumentStartNotEvenNan) {
  const Shape shape{2, 290, 64};
  if (!this->can(shape)) {
    GTEST_SKIP() << "needs sm_90";
  }
  for (const int64_t start : {16, 37, 128, 200, 256}) {
    SCOPED_TRACE(start);
    Problem problem = this->random(shape, Gate::kWith, State::kGiven);
    problem.starts = starts_at(shape, {start});
    const Result clean = this->run_kernel(problem);
    const auto spoil = [&](int64_t begin, int64_t end) {
      Problem spoilt = problem;
      for (int64_t i = begin * shape.dim_att; i < end * shape.dim_att; ++i) {
        for (Numbers Problem::*tokens : {&Problem::k, &Problem::v, &Problem::dy}) {
          (spoilt.*tokens)[static_cast<size_t>(i)] = std::numeric_limits<double>::quiet_NaN();
        }
      }
      return this->run_kernel(spoilt);
    };
    // The first row alone is spoilt; no token of the second is.
    const auto expect_untouched = [&](const Result& spoilt, int64_t begin, int64_t end) {
      for (Numbers Result::*tokens : {&Result::y, &Result::dk, &Result::dv, &Result::dr}) {
        EXPECT_TRUE(close(tokens_of(spoilt.*tokens, shape, begin, end),
                          tokens_of(clean.*tokens, shape, begin, end),
                          0));
      }
    };
    const Result first_spoilt = spoil(start - 3, start);
    expect_untouched(first_spoilt, start, shape.seq_len);
    EXPECT_TRUE(std::isnan(first_spoilt.y[static_cast<size_t>((start - 1) * shape.dim_att)]));
    EXPECT_TRUE(close(first_spoilt.state_out, clean.state_out, 0));
    const Result second_spoilt = spoil(start, start + 3);
    expect_untouched(second_spoilt, 0, start);
    EXPECT_TRUE(std::isnan(second_spoilt.dk[static_cast<size_t>(start * shape.dim_att)]));
    EXPECT_TRUE(close(second_spoilt.dstate, clean.dstate, 0));
  }
}

// ---- Edges of the interface ---------------------------------------------------------------------

TYPED_TEST(Wkv4KernelTest, WithoutTokensTheStateIsReturned) {
  const Problem problem = this->random({2, 0, 8}, Gate::kWithout, State::kGiven);
  const Result result = this->run_kernel(problem);
  EXPECT_EQ(result.state_out, problem.state);
  EXPECT_EQ(result.dw, Numbers(8));
  EXPECT_EQ(result.du, Numbers(8));
  Numbers dstate = problem.dstate_out;
  for (size_t i = 0; i < dstate.size(); ++i) {
    // p has no gradient.
    dstate[i] = i / 8 % 3 == 2 ? 0 : dstate[i];
  }
  EXPECT_EQ(result.dstate, dstate);

  Problem without_gradient = problem;
  without_gradient.dstate_out.clear();
  EXPECT_EQ(this->run_kernel(without_gradient).dstate, Numbers(dstate.size()));
}

TYPED_TEST(Wkv4KernelTest, NothingIsLaunchedForNoRowsOrChannels) {
  using Type = typename TypeParam::Element;
  for (const Shape shape : {Shape{0, 5, 8}, Shape{2, 5, 0}}) {
    Wkv4Inputs<Type> in;
    in.batch_size = shape.batch_size;
    in.seq_len = shape.seq_len;
    in.dim_att = shape.dim_att;
    EXPECT_EQ(launch_wkv4(TypeParam::kKernel, Wkv4Forward<Type>{.in = in}, nullptr), cudaSuccess);
    EXPECT_EQ(launch_wkv4_backward(TypeParam::kKernel, Wkv4Backward<Type>{.in = in}, nullptr),
              cudaSuccess);
  }
}

TEST(Wkv4Kernels, BackwardOfOneFollowsForwardOfAnother) {
  for (const Shape shape : {Shape{2, 17, 64}, Shape{2, 290, 64}}) {
    const Problem problem = random_problem<float>(shape, Gate::kWith, State::kGiven);
    for (const Wkv4Kernel forward : kKernels) {
      for (const Wkv4Kernel backward : kKernels) {
        if (is_supported<float>(forward, shape) && is_supported<float>(backward, shape)) {
          SCOPED_TRACE(testing::Message() << "forward of kernel " << static_cast<int>(forward)
                                          << ", backward of " << static_cast<int>(backward));
          expect_matches(problem, run<float>(forward, backward, problem), kTolerance<float>);
        }
      }
    }
  }
}

}  // namespace
}  // namespace rwkv::test
