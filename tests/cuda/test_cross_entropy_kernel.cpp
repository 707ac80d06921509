// cross_entropy and the sum of its losses against their definitions in float64.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/cross_entropy_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

template <typename Element>
class CrossEntropyKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(CrossEntropyKernel, Elements);

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// performance.md's gates: a loss is a sum of fp32 rounded terms, a gradient is rounded once.
constexpr double kLossTolerance = 1e-6;
template <typename Element>
constexpr double kGradientTolerance = sizeof(Element) == 2 ? 3e-3 : 2e-6;

struct Shape {
  int64_t N, V, V_padded;
};
// A column alone; ends within, at and behind a vector; rows that are not aligned; several turns of
// the block; a real vocabulary; and more than shared memory keeps.
constexpr Shape kShapes[] = {{1, 1, 1},
                             {1, 1, 8},
                             {2, 15, 16},
                             {1, 16, 16},
                             {1, 17, 32},
                             {1, 63, 65},
                             {3, 129, 129},
                             {1, 257, 264},
                             {1, 4099, 4104},
                             {1, 5003, 5003},
                             {1, 50277, 50304},
                             {1, 65536, 65536},
                             {1, 65533, 65533}};

struct Rows {
  Shape shape;
  Numbers logits;  // [N, V_padded]; NaN and infinities behind V
  Numbers targets;
  double l2wrap = 0.01;
  double scale = 0.5;

  double logit(int64_t n, int64_t v) const {
    return logits[static_cast<size_t>(n * shape.V_padded + v)];
  }
};

template <typename Element>
Rows random_rows(Shape shape) {
  Rows rows{.shape = shape,
            .logits = rounded<Element>(normal(shape.N * shape.V_padded, 1, 3)),
            .targets = {}};
  for (int64_t n = 0; n < shape.N; ++n) {
    for (int64_t v = shape.V; v < shape.V_padded; ++v) {
      rows.logits[static_cast<size_t>(n * shape.V_padded + v)] = v % 2 == 0 ? kNaN : kInfinity;
    }
    // The last column, then the first, then some other.
    rows.targets.push_back(static_cast<double>(n == 0 ? shape.V - 1 : n == 1 ? 0 : shape.V / 3));
  }
  return rows;
}

// What is compared apart, for the target's gradient is larger than all others together.
struct Expected {
  Numbers losses, gradient;
  std::vector<bool> special;  // of a target or the largest
};

Expected reference(const Rows& rows) {
  const auto [N, V, V_padded] = rows.shape;
  Expected expected;
  for (int64_t n = 0; n < N; ++n) {
    const auto target = static_cast<int64_t>(rows.targets[static_cast<size_t>(n)]);
    int64_t largest = 0;
    for (int64_t v = 1; v < V; ++v) {
      largest = rows.logit(n, v) > rows.logit(n, largest) ? v : largest;
    }
    const double max = rows.logit(n, largest);
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) {
      sum += std::exp(rows.logit(n, v) - max);
    }
    expected.losses.push_back(max + std::log(sum) - rows.logit(n, target));
    for (int64_t v = 0; v < V_padded; ++v) {
      const double gradient = std::exp(rows.logit(n, v) - max) / sum - (v == target ? 1 : 0) +
                              (v == largest ? rows.l2wrap * max : 0);
      expected.gradient.push_back(v < V ? rows.scale * gradient : 0);
      expected.special.push_back(v == target || v == largest);
    }
  }
  return expected;
}

// Losses and gradient; the rows lie `offset` elements behind an aligned address.
template <typename Element>
Outputs gradient_of(const Rows& rows, int64_t offset = 0) {
  Numbers shifted(static_cast<size_t>(offset), 7);
  shifted.insert(shifted.end(), rows.logits.begin(), rows.logits.end());
  DeviceArray<Element> logits(shifted);
  const DeviceArray<int64_t> targets(rows.targets);
  DeviceArray<float> losses(rows.shape.N);
  expect_launched(launch_cross_entropy_gradient(logits.data() + offset,
                                                targets.data(),
                                                losses.data(),
                                                rows.shape.N,
                                                rows.shape.V,
                                                rows.shape.V_padded,
                                                static_cast<float>(rows.l2wrap),
                                                static_cast<float>(rows.scale),
                                                nullptr),
                  "cross_entropy gradient");
  Numbers gradient = logits.numbers();
  gradient.erase(gradient.begin(), gradient.begin() + offset);
  return {losses.numbers(), gradient};
}

template <typename Element>
Numbers losses_of(const Rows& rows) {
  const DeviceArray<Element> logits(rows.logits);
  const DeviceArray<int64_t> targets(rows.targets);
  DeviceArray<float> losses(rows.shape.N);
  expect_launched(launch_cross_entropy(logits.data(),
                                       targets.data(),
                                       losses.data(),
                                       rows.shape.N,
                                       rows.shape.V,
                                       rows.shape.V_padded,
                                       nullptr),
                  "cross_entropy");
  return losses.numbers();
}

template <typename Element>
void expect_close(const Outputs& outputs, const Expected& expected, const std::string& what) {
  EXPECT_TRUE(close(outputs[0], expected.losses, kLossTolerance)) << what;
  Numbers special, expected_special, others, expected_others;
  for (size_t i = 0; i < expected.gradient.size(); ++i) {
    (expected.special[i] ? special : others).push_back(outputs[1][i]);
    (expected.special[i] ? expected_special : expected_others).push_back(expected.gradient[i]);
  }
  EXPECT_TRUE(close(special, expected_special, kGradientTolerance<Element>))
      << what << ", targets and largest";
  EXPECT_TRUE(close(others, expected_others, kGradientTolerance<Element>)) << what << ", others";
}

TYPED_TEST(CrossEntropyKernel, GradientMatchesTheDefinition) {
  for (const Shape& shape : kShapes) {
    const Rows rows = random_rows<TypeParam>(shape);
    const auto outputs = same_in_every_order([&] { return gradient_of<TypeParam>(rows); });
    expect_close<TypeParam>(
        outputs,
        reference(rows),
        "V " + std::to_string(shape.V) + " of " + std::to_string(shape.V_padded));
  }
}

TYPED_TEST(CrossEntropyKernel, LossAloneMatchesTheDefinition) {
  for (const Shape& shape : kShapes) {
    if (shape.V > 60000) {
      continue;  // too long for shared memory, which this kernel does not use
    }
    const Rows rows = random_rows<TypeParam>(shape);
    const auto outputs = same_in_every_order([&] { return Outputs{losses_of<TypeParam>(rows)}; });
    EXPECT_TRUE(close(outputs[0], reference(rows).losses, kLossTolerance)) << shape.V;
  }
}

TYPED_TEST(CrossEntropyKernel, RowsNeedNoAlignment) {
  const Rows rows = random_rows<TypeParam>({.N = 2, .V = 1031, .V_padded = 1032});
  expect_close<TypeParam>(gradient_of<TypeParam>(rows, 1), reference(rows), "one element further");
}

TYPED_TEST(CrossEntropyKernel, ThePenaltyFallsOnTheFirstOfEqualMaxima) {
  // Equal ones in one vector, in those of neighbouring threads, of another warp, and of one
  // thread's two turns; the target is the first, the second, or neither.
  const std::vector<int64_t> seconds{3, 9, 900, 512 * 4 + 2, 512 * 8 + 2, 4999};
  for (const int64_t second : seconds) {
    for (const int64_t target : {int64_t{2}, second, int64_t{77}}) {
      Rows rows = random_rows<TypeParam>({.N = 1, .V = 5000, .V_padded = 5000});
      rows.logits[2] = rows.logits[static_cast<size_t>(second)] = 20;
      rows.targets[0] = static_cast<double>(target);
      expect_close<TypeParam>(
          gradient_of<TypeParam>(rows), reference(rows), "second at " + std::to_string(second));
    }
  }
}

TYPED_TEST(CrossEntropyKernel, LargeLogitsAndMaskedOnesAreExact) {
  // Thousands apart; all negative; a masked column, alone in its thread, and nearly all masked.
  Rows rows = random_rows<TypeParam>({.N = 4, .V = 4099, .V_padded = 4104});
  for (int64_t v = 0; v < rows.shape.V; ++v) {
    const auto at = [&](int64_t n) -> double& {
      return rows.logits[static_cast<size_t>(n * rows.shape.V_padded + v)];
    };
    at(0) *= 1000;
    at(1) -= 5000;
    at(2) = v % 3 == 0 ? -kInfinity : at(2);
    at(3) = v == 1366 || v == 4000 ? at(3) : -kInfinity;
  }
  rows.logits = rounded<TypeParam>(rows.logits);
  rows.targets = {0, 1, 4, 1366};
  expect_close<TypeParam>(gradient_of<TypeParam>(rows), reference(rows), "large and masked");
  EXPECT_TRUE(close(losses_of<TypeParam>(rows), reference(rows).losses, kLossTolerance));
}

TYPED_TEST(CrossEntropyKernel, ANaNReachesTheLossAndTheWholeGradient) {
  for (const double poison : {kNaN, kInfinity}) {
    for (const int64_t place : {0, 500, 4098}) {
      Rows rows = random_rows<TypeParam>({.N = 2, .V = 4099, .V_padded = 4104});
      rows.logits[static_cast<size_t>(rows.shape.V_padded + place)] = poison;
      const Outputs outputs = gradient_of<TypeParam>(rows);
      const Numbers losses = losses_of<TypeParam>(rows);
      for (const size_t n : {0, 1}) {
        EXPECT_EQ(std::isnan(outputs[0][n]), n == 1) << place;
        EXPECT_EQ(std::isnan(losses[n]), n == 1) << place;
        for (size_t v = 0; v < 4104; ++v) {
          ASSERT_EQ(std::isnan(outputs[1][n * 4104 + v]), n == 1 && v < 4099) << n << " " << v;
        }
      }
    }
  }
}

TYPED_TEST(CrossEntropyKernel, ATargetOutOfRangeMakesItsRowNaN) {
  for (const double target : {-1.0, 65.0, 72.0, 1e15}) {
    Rows rows = random_rows<TypeParam>({.N = 2, .V = 65, .V_padded = 72});
    rows.targets[1] = target;
    const Outputs outputs = gradient_of<TypeParam>(rows);
    const Numbers losses = losses_of<TypeParam>(rows);
    for (const size_t n : {0, 1}) {
      EXPECT_EQ(std::isnan(outputs[0][n]), n == 1) << target;
      EXPECT_EQ(std::isnan(losses[n]), n == 1) << target;
      for (size_t v = 0; v < 72; ++v) {
        ASSERT_EQ(std::isnan(outputs[1][n * 72 + v]), n == 1 && v < 65) << n << " " << v;
      }
    }
  }
}

TYPED_TEST(CrossEntropyKernel, RejectsSizesAndLaunchesNothingForNoRows) {
  const auto launch = [](int64_t N, int64_t V, int64_t V_padded) {
    const cudaError_t gradient = launch_cross_entropy_gradient<TypeParam>(
        nullptr, nullptr, nullptr, N, V, V_padded, 0, 1, nullptr);
    EXPECT_EQ(launch_cross_entropy<TypeParam>(nullptr, nullptr, nullptr, N, V, V_padded, nullptr),
              gradient);
    return gradient;
  };
  EXPECT_EQ(launch(0, 5, 8), cudaSuccess);
  EXPECT_EQ(launch(1, 0, 8), cudaErrorInvalidValue);
  EXPECT_EQ(launch(1, 9, 8), cudaErrorInvalidValue);
  EXPECT_EQ(launch(1, 9, int64_t{1} << 31), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace rwkv::test
