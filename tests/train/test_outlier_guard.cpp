#include <cmath>
#include <limits>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "train/outlier_guard.h"

namespace rwkv {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Losses 1 and 3 in turn, norms e^-1 and e: means 2 and (of the logarithm) 0, deviations 1.
void add_steps(OutlierGuard& guard, int64_t first, int64_t last) {
  for (int64_t step = first; step <= last; ++step) {
    guard.add_applied(step, step % 2 == 0 ? 1 : 3, std::exp(step % 2 == 0 ? -1 : 1));
  }
}

TEST(OutlierGuard, LimitsAreSoManyDeviationsAboveTheMean) {
  OutlierGuard guard;
  add_steps(guard, 1, 64);
  const OutlierLimits limits = guard.limits(66, 4);
  EXPECT_DOUBLE_EQ(limits.loss_mean, 2);
  EXPECT_DOUBLE_EQ(limits.loss_deviation, 1);
  EXPECT_DOUBLE_EQ(limits.loss, 6);
  EXPECT_NEAR(limits.log_norm_mean, 0, 1e-15);
  EXPECT_DOUBLE_EQ(limits.log_norm_deviation, 1);
  EXPECT_DOUBLE_EQ(limits.gradient_norm, std::exp(4));
}

TEST(OutlierGuard, HasNoLimitsBeforeThereAreThirtyTwoSteps) {
  OutlierGuard guard;
  add_steps(guard, 1, 31);
  EXPECT_EQ(guard.limits(33, 1).loss, kInfinity);
  EXPECT_EQ(guard.limits(33, 1).gradient_norm, kInfinity);
  add_steps(guard, 32, 32);
  EXPECT_EQ(guard.limits(33, 1).loss, kInfinity);  // the step just before does not count
  EXPECT_LT(guard.limits(34, 1).loss, kInfinity);
  EXPECT_LT(guard.limits(34, 1).gradient_norm, kInfinity);
}

// A device is at step n - 1 when n is launched; on a CPU that is done.
TEST(OutlierGuard, DecidesAlikeWhetherOrNotTheStepBeforeIsKnown) {
  OutlierGuard behind, ahead;
  add_steps(behind, 1, 200);
  add_steps(ahead, 1, 200);
  ahead.add_applied(201, 1000, 1000);
  EXPECT_EQ(behind.limits(202, 6).loss, ahead.limits(202, 6).loss);
  EXPECT_EQ(behind.limits(202, 6).gradient_norm, ahead.limits(202, 6).gradient_norm);
  EXPECT_GT(ahead.limits(203, 6).loss, 100);
}

TEST(OutlierGuard, LooksAtTheLast128AppliedSteps) {
  OutlierGuard guard, shorter;
  for (int64_t step = 1; step <= 100; ++step) {
    guard.add_applied(step, 50, 50);
  }
  guard.add_skipped();
  add_steps(guard, 102, 101 + 128);
  add_steps(shorter, 102, 101 + 128);
  EXPECT_EQ(guard.limits(231, 6).loss, shorter.limits(231, 6).loss);
  EXPECT_GT(guard.limits(230, 6).loss, shorter.limits(230, 6).loss);  // one of the first is in it
}

TEST(OutlierGuard, TakesRoundingForNoOutlier) {
  OutlierGuard guard;
  for (int64_t step = 1; step <= 128; ++step) {
    guard.add_applied(step, 0.1, 0);
  }
  EXPECT_GT(guard.limits(130, 1).loss, 0.1 + 0.9e-6);
  EXPECT_GT(guard.limits(130, 1).gradient_norm, 0);
}

TEST(OutlierGuard, CountsThoseInARow) {
  OutlierGuard guard;
  guard.add_skipped();
  guard.add_skipped();
  EXPECT_EQ(guard.num_in_a_row(), 2);
  guard.add_applied(3, 1, 1);
  EXPECT_EQ(guard.num_in_a_row(), 0);
  guard.add_skipped();
  EXPECT_EQ(guard.num_in_a_row(), 1);
  EXPECT_EQ(guard.num_skipped(), 3);
  guard.forget();
  EXPECT_EQ(guard.num_in_a_row(), 0);
  EXPECT_EQ(guard.num_skipped(), 3);
  EXPECT_EQ(guard.limits(100, 1).loss, kInfinity);
}

TEST(OutlierGuard, ComesBackExactlyFromText) {
  OutlierGuard guard;
  EXPECT_TRUE(guard.is_empty());
  for (int64_t step = 1; step <= 150; ++step) {
    guard.add_applied(
        step, 1 + std::sin(static_cast<double>(step)) / 3, 1.0 / static_cast<double>(step));
  }
  guard.add_skipped();
  const std::string text = guard.to_json().dump(2);
  const OutlierGuard read = OutlierGuard::from_json(nlohmann::json::parse(text));
  EXPECT_EQ(read.to_json().dump(2), text);
  EXPECT_EQ(read.num_skipped(), 1);
  EXPECT_EQ(read.num_in_a_row(), 1);
  for (const int64_t step : {151, 152, 153}) {
    EXPECT_EQ(read.limits(step, 6).loss, guard.limits(step, 6).loss) << step;
    EXPECT_EQ(read.limits(step, 6).gradient_norm, guard.limits(step, 6).gradient_norm) << step;
  }
  EXPECT_THROW(OutlierGuard::from_json(nlohmann::json::parse(R"({"skipped": 1})")),
               nlohmann::json::exception);
}

TEST(SkippedStep, IsALineWithTheNumbersAndTheirLimits) {
  const SkippedStep skipped{.step = 40,
                            .first_sample = 312,
                            .last_sample = 319,
                            .loss = 7.5,
                            .gradient_norm = 2.25,
                            .limits = {.loss = 3, .gradient_norm = 2.5, .loss_mean = 2}};
  const auto json = nlohmann::json::parse(to_json(skipped, 1.8e9));
  EXPECT_EQ(json.at("step"), 40);
  EXPECT_EQ(json.at("first_sample"), 312);
  EXPECT_EQ(json.at("last_sample"), 319);
  EXPECT_EQ(json.at("loss"), 7.5);
  EXPECT_EQ(json.at("grad_norm"), 2.25);
  EXPECT_EQ(json.at("loss_limit"), 3);
  EXPECT_EQ(json.at("grad_norm_limit"), 2.5);
  EXPECT_EQ(json.at("loss_mean"), 2);
  EXPECT_EQ(json.at("time"), 1.8e9);
  EXPECT_EQ(describe(skipped),
            "step 40, of samples 312 to 319: loss 7.5000 and gradient norm 2.25, where 3.0000 and "
            "2.5 are the limits");
}

}  // namespace
}  // namespace rwkv
