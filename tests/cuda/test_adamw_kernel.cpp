// The optimizer's kernels against their definitions in float64.
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cuda/adamw_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

template <typename Element>
class AdamwKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(AdamwKernel, Elements);

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Doubles in device memory, as a struct of them or as an array.
class DeviceDoubles {
 public:
  explicit DeviceDoubles(const Numbers& numbers) : count_(numbers.size()), bytes_(8 * size()) {
    EXPECT_EQ(cudaMemcpy(bytes_.data(), numbers.data(), 8 * count_, cudaMemcpyHostToDevice),
              cudaSuccess);
  }
  // NaN, to be written.
  explicit DeviceDoubles(int64_t size) : count_(static_cast<size_t>(size)), bytes_(8 * size) {}

  double* data() { return reinterpret_cast<double*>(bytes_.data()); }
  AdamwNumbers* adamw() { return reinterpret_cast<AdamwNumbers*>(bytes_.data()); }
  Numbers numbers() const {
    Numbers result(count_);
    EXPECT_EQ(cudaMemcpy(result.data(), bytes_.data(), 8 * count_, cudaMemcpyDeviceToHost),
              cudaSuccess);
    return result;
  }

 private:
  int64_t size() const { return static_cast<int64_t>(count_); }

  size_t count_;
  DeviceArray<uint8_t> bytes_;
};

constexpr AdamwFactors kFactors{.beta1 = 0.9, .beta2 = 0.99, .eps = 1e-8};

// Ranges that begin and end within vectors, a gap between two of them, an empty one, several
// pieces.
constexpr AdamwRanges kRanges{.count = 5,
                              .ranges = {{0, 5003, 1, 0.1},
                                         {5003, 5010, 2, 0},
                                         {5010, 5010, 1, 0},
                                         {5012, 5013, 3, 0.01},
                                         {5016, 9219, 0.5, 0.1}}};
constexpr int64_t kSize = 9221;

struct Parameter {
  double p, m, v;
};

// One update of an element of a range.
void update(Parameter& at, double gradient, const AdamwRange& range, double lr, double step) {
  const auto [beta1, beta2, eps] = kFactors;
  at.m = beta1 * at.m + (1 - beta1) * gradient;
  at.v = beta2 * at.v + (1 - beta2) * gradient * gradient;
  const double m = at.m / (1 - std::pow(beta1, step)), v = at.v / (1 - std::pow(beta2, step));
  at.p -= lr * range.lr_scale * (range.weight_decay * at.p + m / (std::sqrt(v) + eps));
}

// Buffers of an optimizer on the device, master weights fp32 or split.
template <typename Gradient>
struct DeviceState {
  explicit DeviceState(const Numbers& master_values)
      : master(master_values),
        weights(master.size()),
        split_weights(master.size()),
        low(master.size()),
        m(Numbers(master_values.size(), 0.0)),
        v(Numbers(master_values.size(), 0.0)),
        split_m(Numbers(master_values.size(), 0.0)),
        split_v(Numbers(master_values.size(), 0.0)) {
    expect_launched(launch_split_master(
                        master.data(), split_weights.data(), low.data(), master.size(), nullptr),
                    "split_master");
  }

  void update(const Numbers& gradient, AdamwNumbers* numbers) {
    const DeviceArray<Gradient> dev_gradient(gradient);
    const AdamwUpdate<Gradient> whole{.master = master.data(),
                                      .weights = weights.data(),
                                      .m = m.data(),
                                      .v = v.data(),
                                      .gradient = dev_gradient.data(),
                                      .ranges = kRanges,
                                      .factors = kFactors,
                                      .numbers = numbers};
    expect_launched(launch_adamw(whole, nullptr), "adamw");
    const AdamwUpdate<Gradient> split{.weights = split_weights.data(),
                                      .low = low.data(),
                                      .m = split_m.data(),
                                      .v = split_v.data(),
                                      .gradient = dev_gradient.data(),
                                      .ranges = kRanges,
                                      .factors = kFactors,
                                      .numbers = numbers};
    expect_launched(launch_adamw(split, nullptr), "adamw with a split master");
  }
  Numbers joined() const {
    DeviceArray<float> result(master.size());
    expect_launched(
        launch_join_master(split_weights.data(), low.data(), result.data(), master.size(), nullptr),
        "join_master");
    return result.numbers();
  }
  Outputs outputs() const {
    return {master.numbers(),
            joined(),
            m.numbers(),
            v.numbers(),
            split_m.numbers(),
            split_v.numbers(),
            weights.numbers(),
            split_weights.numbers()};
  }

  DeviceArray<float> master;
  DeviceArray<__nv_bfloat16> weights, split_weights;
  DeviceArray<int16_t> low;
  DeviceArray<float> m, v, split_m, split_v;
};

bool in_a_range(int64_t i) {
  for (const AdamwRange& range : kRanges.ranges) {
    if (i >= range.begin && i < range.end) {
      return true;
    }
  }
  return false;
}

TYPED_TEST(AdamwKernel, SumOfSquaresMatchesTheDefinition) {
  for (const int64_t n : {1, 7, 8, 9, 2049, 32768, 32769, 100003}) {
    for (const int64_t offset : {0, 1}) {
      const Numbers x = rounded<TypeParam>(normal(n + offset, 1, 100));
      double sum = 2.5;  // what is there stays
      for (int64_t i = offset; i < n + offset; ++i) {
        sum += x[static_cast<size_t>(i)] * x[static_cast<size_t>(i)];
      }
      const auto outputs = same_in_every_order([&] {
        const DeviceArray<TypeParam> dev_x(x);
        DeviceDoubles scratch(sum_of_squares_scratch_size(n)), dev_sum(Numbers{2.5});
        expect_launched(launch_add_sum_of_squares(
                            dev_x.data() + offset, n, scratch.data(), dev_sum.data(), nullptr),
                        "sum_of_squares");
        return Outputs{dev_sum.numbers()};
      });
      EXPECT_TRUE(close(outputs[0], {sum}, 1e-7)) << n << " from " << offset;
    }
  }
  EXPECT_EQ(launch_add_sum_of_squares<TypeParam>(nullptr, 0, nullptr, nullptr, nullptr),
            cudaSuccess);
}

TYPED_TEST(AdamwKernel, ANumberThatIsNotFiniteReachesTheSum) {
  for (const double poison : {kNaN, kInfinity, -kInfinity}) {
    Numbers x = normal(40000, 1);
    x[33000] = poison;
    const DeviceArray<TypeParam> dev_x(x);
    DeviceDoubles scratch(sum_of_squares_scratch_size(40000)), sum(Numbers{0});
    expect_launched(
        launch_add_sum_of_squares(dev_x.data(), 40000, scratch.data(), sum.data(), nullptr),
        "sum_of_squares");
    EXPECT_FALSE(std::isfinite(sum.numbers()[0])) << poison;
  }
}

TEST(BeginAdamwKernel, ClipsCountsAndSkips) {
  struct Case {
    double sum, loss, clip_norm;  // in
    double clip, skip;            // out
  };
  // Without clipping, below the bound, above it; then what is not finite, and that it stays so.
  const Case cases[] = {{16, 2, 0, 1, 0},
                        {16, 2, 5, 1, 0},
                        {16, 2, 1, 1 / (4 + 1e-6), 0},
                        {0, 0, 1, 1, 0},
                        {kInfinity, 2, 1, 0, 1},
                        {16, 3, 0, 1, 1}};
  const auto begin = [](DeviceDoubles& numbers, double sum, double loss, double clip_norm) {
    DeviceDoubles dev_sum(Numbers{sum}), dev_loss(Numbers{loss});
    expect_launched(
        launch_begin_adamw(numbers.adamw(), dev_sum.data(), dev_loss.data(), clip_norm, nullptr),
        "begin_adamw");
    return numbers.numbers();
  };
  DeviceDoubles run(Numbers{1e-3, 41, 0, 0, 0, 0, 0, kInfinity, kInfinity});
  double steps = 41;
  for (const Case& at : cases) {
    steps += at.skip == 0 ? 1 : 0;
    EXPECT_EQ(
        begin(run, at.sum, at.loss, at.clip_norm),
        (Numbers{
            1e-3, steps, at.loss, std::sqrt(at.sum), at.clip, at.skip, 0, kInfinity, kInfinity}))
        << at.sum;
  }
  for (const Numbers& inputs :
       {Numbers{kNaN, 1}, Numbers{1, kNaN}, Numbers{1, kInfinity}, Numbers{1, -kInfinity}}) {
    DeviceDoubles fresh(Numbers{1e-3, 7, 0, 0, 0, 0, 0, kInfinity, kInfinity});
    const Numbers after = begin(fresh, inputs[0], inputs[1], 1);
    EXPECT_EQ(after[1], 7) << inputs[1];
    EXPECT_EQ(after[5], 1) << inputs[1];
  }
}

// Against the same definition as Optimizer.SkipsOutliers in tests/train/test_optimizer.cpp.
TEST(BeginAdamwKernel, LeavesOutliersOutOfTheCount) {
  struct Case {
    double sum, loss;       // in
    double outlier, steps;  // out
  };
  // At the limits, above one, above the other, and that the next step is looked at anew; then what
  // is not finite is more than an outlier.
  const Case cases[] = {{16, 2, 0, 8},
                        {16, 2.5, 1, 8},
                        {25, 2, 1, 8},
                        {25, 2.5, 1, 8},
                        {9, 1, 0, 9},
                        {kInfinity, 2, 1, 9}};
  DeviceDoubles numbers(Numbers{1e-3, 7, 0, 0, 0, 0, 0, 2, 4});
  for (const Case& at : cases) {
    DeviceDoubles sum(Numbers{at.sum}), loss(Numbers{at.loss});
    expect_launched(launch_begin_adamw(numbers.adamw(), sum.data(), loss.data(), 0, nullptr),
                    "begin_adamw");
    const Numbers after = numbers.numbers();
    EXPECT_EQ(after,
              (Numbers{1e-3,
                       at.steps,
                       at.loss,
                       std::sqrt(at.sum),
                       1,
                       std::isfinite(at.sum) ? 0.0 : 1.0,
                       at.outlier,
                       2,
                       4}))
        << at.sum << ", " << at.loss;
  }
}

// The whole step, as a trainer makes it; the learning rate and the size of the gradient change, so
// that it is clipped in some steps only.
TYPED_TEST(AdamwKernel, AHundredStepsMatchTheDefinition) {
  const Numbers start = rounded<float>(normal(kSize, 1));
  DeviceState<TypeParam> state(start);
  DeviceDoubles numbers(Numbers{0, 0, 0, 0, 0, 0, 0, kInfinity, kInfinity}),
      scratch(sum_of_squares_scratch_size(kSize));
  DeviceDoubles loss(Numbers{1});
  std::vector<Parameter> parameters;
  for (const double p : start) {
    parameters.push_back({p, 0, 0});
  }
  int clipped = 0;
  for (int step = 1; step <= 100; ++step) {
    const double lr = 1e-3 / step, clip_norm = 50;
    const Numbers gradient = rounded<TypeParam>(
        normal(kSize, 100 + static_cast<uint64_t>(step), step % 3 == 0 ? 1 : 0.1));
    DeviceDoubles sum(Numbers{0});
    const DeviceArray<TypeParam> dev_gradient(gradient);
    expect_launched(
        launch_add_sum_of_squares(dev_gradient.data(), kSize, scratch.data(), sum.data(), nullptr),
        "sum_of_squares");
    Numbers control = numbers.numbers();
    control[0] = lr;
    ASSERT_EQ(
        cudaMemcpy(numbers.data(), control.data(), sizeof(AdamwNumbers), cudaMemcpyHostToDevice),
        cudaSuccess);
    expect_launched(
        launch_begin_adamw(numbers.adamw(), sum.data(), loss.data(), clip_norm, nullptr),
        "begin_adamw");
    state.update(gradient, numbers.adamw());

    double squares = 0;
    for (const double g : gradient) {
      squares += g * g;
    }
    const double clip = std::min(1.0, clip_norm / (std::sqrt(squares) + 1e-6));
    clipped += clip < 1 ? 1 : 0;
    for (const AdamwRange& range : kRanges.ranges) {
      for (int64_t i = range.begin; i < range.end; ++i) {
        update(parameters[static_cast<size_t>(i)],
               clip * gradient[static_cast<size_t>(i)],
               range,
               lr,
               step);
      }
    }
  }
  EXPECT_EQ(clipped, 33);
  Numbers p, m, v;
  for (const Parameter& parameter : parameters) {
    p.push_back(parameter.p);
    m.push_back(parameter.m);
    v.push_back(parameter.v);
  }
  EXPECT_TRUE(close(state.master.numbers(), p, 1e-6));
  EXPECT_TRUE(close(state.m.numbers(), m, 1e-6));
  EXPECT_TRUE(close(state.v.numbers(), v, 1e-6));
  // The same numbers in another form; those in no range are as they were.
  EXPECT_EQ(state.joined(), state.master.numbers());
  EXPECT_EQ(state.split_m.numbers(), state.m.numbers());
  EXPECT_EQ(state.split_v.numbers(), state.v.numbers());
  const Numbers masters = state.master.numbers(), weights = state.weights.numbers(),
                split_weights = state.split_weights.numbers();
  const Numbers expected = rounded<__nv_bfloat16>(masters);
  for (int64_t n = 0; n < kSize; ++n) {
    const auto i = static_cast<size_t>(n);
    const auto master = static_cast<float>(masters[i]);
    uint32_t bits;
    std::memcpy(&bits, &master, sizeof bits);
    const bool tie = (bits & 0xffff) == 0x8000;
    if (!in_a_range(n)) {
      ASSERT_EQ(masters[i], start[i]) << n;
      ASSERT_TRUE(std::isnan(weights[i])) << n;  // not written
    } else {
      ASSERT_EQ(weights[i], expected[i]) << n;
      ASSERT_TRUE(tie || split_weights[i] == expected[i]) << n;
    }
  }
}

TYPED_TEST(AdamwKernel, RunsAgreeBitForBit) {
  same_in_every_order([&] {
    DeviceState<TypeParam> state(rounded<float>(normal(kSize, 1)));
    DeviceDoubles numbers(Numbers{1e-3, 3, 1, 1, 0.5, 0, 0, kInfinity, kInfinity});
    state.update(normal(kSize, 2), numbers.adamw());
    return state.outputs();
  });
}

TYPED_TEST(AdamwKernel, ASkippedStepWritesNothing) {
  DeviceState<TypeParam> state(rounded<float>(normal(kSize, 1)));
  const Outputs before = state.outputs();
  // Of one that is not finite, and of an outlier.
  for (const auto& [skip, outlier] : {std::pair{1.0, 0.0}, std::pair{0.0, 1.0}}) {
    DeviceDoubles numbers(Numbers{1e-3, 3, 1, 1, 1, skip, outlier, kInfinity, kInfinity});
    state.update(normal(kSize, 2), numbers.adamw());
    const Outputs after = state.outputs();
    for (size_t i = 0; i < before.size(); ++i) {
      EXPECT_EQ(std::memcmp(before[i].data(), after[i].data(), 8 * before[i].size()), 0) << i;
    }
  }
}

TYPED_TEST(AdamwKernel, WeightsAreOptional) {
  const Numbers start = rounded<float>(normal(kSize, 1)), gradient = normal(kSize, 2);
  DeviceState<TypeParam> state(start);
  DeviceDoubles numbers(Numbers{1e-3, 3, 1, 1, 0.5, 0, 0, kInfinity, kInfinity});
  state.update(gradient, numbers.adamw());
  DeviceArray<float> master(start), m(Numbers(start.size(), 0.0)), v(Numbers(start.size(), 0.0));
  const DeviceArray<TypeParam> dev_gradient(gradient);
  const AdamwUpdate<TypeParam> arguments{.master = master.data(),
                                         .m = m.data(),
                                         .v = v.data(),
                                         .gradient = dev_gradient.data(),
                                         .ranges = kRanges,
                                         .factors = kFactors,
                                         .numbers = numbers.adamw()};
  expect_launched(launch_adamw(arguments, nullptr), "adamw without weights");
  EXPECT_EQ(master.numbers(), state.master.numbers());
}

TYPED_TEST(AdamwKernel, RejectsTooManyRangesAndMisalignedBuffers) {
  DeviceArray<float> master(Numbers(8, 0.0)), m(Numbers(8, 0.0)), v(Numbers(8, 0.0));
  const DeviceArray<TypeParam> gradient(Numbers(8, 0.0));
  DeviceDoubles numbers(Numbers{1e-3, 3, 1, 1, 1, 0, 0, kInfinity, kInfinity});
  const auto launch = [&](AdamwRanges ranges, int64_t master_at, int64_t gradient_at) {
    const AdamwUpdate<TypeParam> arguments{.master = master.data() + master_at,
                                           .m = m.data(),
                                           .v = v.data(),
                                           .gradient = gradient.data() + gradient_at,
                                           .ranges = ranges,
                                           .factors = kFactors,
                                           .numbers = numbers.adamw()};
    return launch_adamw(arguments, nullptr);
  };
  EXPECT_EQ(launch({.count = kMaxAdamwRanges + 1, .ranges = {}}, 0, 0), cudaErrorInvalidValue);
  EXPECT_EQ(launch({.count = 0, .ranges = {}}, 0, 0), cudaSuccess);
  EXPECT_EQ(launch({.count = 1, .ranges = {{0, 4, 1, 0}}}, 1, 0), cudaErrorMisalignedAddress);
  EXPECT_EQ(launch({.count = 1, .ranges = {{0, 4, 1, 0}}}, 0, 1), cudaErrorMisalignedAddress);
}

TEST(SplitMasterKernel, EveryKindOfNumberComesBack) {
  // Around each rounding boundary of each exponent: zeros, denormals, ties, the largest numbers,
  // those that round to infinity, infinity; both signs.
  std::vector<float> values;
  for (uint32_t high = 0; high <= 0x7f80; high += high < 8 || high > 0x7f70 ? 1 : 61) {
    for (const uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      for (const uint32_t sign : {0u, 0x80000000u}) {
        const uint32_t bits = sign | high << 16 | (high == 0x7f80 ? 0 : low);
        float value;
        std::memcpy(&value, &bits, sizeof value);
        values.push_back(value);
      }
    }
  }
  const auto size = static_cast<int64_t>(values.size());
  const DeviceArray<float> master(Numbers(values.begin(), values.end()));
  DeviceArray<__nv_bfloat16> weights(size);
  DeviceArray<int16_t> low(size);
  DeviceArray<float> joined(size);
  expect_launched(launch_split_master(master.data(), weights.data(), low.data(), size, nullptr),
                  "split");
  expect_launched(launch_join_master(weights.data(), low.data(), joined.data(), size, nullptr),
                  "join");
  EXPECT_EQ(std::memcmp(joined.elements().data(), values.data(), 4 * values.size()), 0);
  // To nearest, ties away from zero: no bf16 number is nearer.
  const Numbers rounded_even = rounded<__nv_bfloat16>(master.numbers());
  const Numbers actual = weights.numbers();
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    if ((bits & 0xffff) == 0x8000) {
      EXPECT_GT(std::abs(actual[i]), std::abs(values[i]));
    } else {
      EXPECT_EQ(actual[i], rounded_even[i]);
    }
  }
  EXPECT_EQ(launch_split_master(nullptr, nullptr, nullptr, 0, nullptr), cudaSuccess);
}

TEST(SplitMasterKernel, ANaNStaysOne) {
  std::vector<float> values;
  for (const uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0xff808000u}) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    values.push_back(value);
  }
  DeviceArray<float> master(5), joined(5);
  ASSERT_EQ(cudaMemcpy(master.data(), values.data(), 20, cudaMemcpyHostToDevice), cudaSuccess);
  DeviceArray<__nv_bfloat16> weights(5);
  DeviceArray<int16_t> low(5);
  expect_launched(launch_split_master(master.data(), weights.data(), low.data(), 5, nullptr),
                  "split");
  expect_launched(launch_join_master(weights.data(), low.data(), joined.data(), 5, nullptr),
                  "join");
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_TRUE(std::isnan(weights.numbers()[i])) << i;
    EXPECT_TRUE(std::isnan(joined.numbers()[i])) << i;
  }
}

}  // namespace
}  // namespace rwkv::test
