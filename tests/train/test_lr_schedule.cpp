#include <cmath>
#include <limits>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/lr_schedule.h"

namespace rwkv {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

// 100 tokens of warm-up, then 900: the sizes at which PyTorch 2.11's schedulers were asked for the
// figures below (CosineAnnealingLR, ExponentialLR, LinearLR; lr 6e-4 to 1e-5, 900 steps; warm-up
// LinearLR from 0.2 over 100). They step in a loop, so their last digits wander.
constexpr int64_t kTotal = 1000;
constexpr double kRelative = 1e-12;

LrSchedule schedule_of(ScheduleKind kind) {
  return {.kind = kind, .lr_init = 6e-4, .lr_final = 1e-5, .warmup_tokens = 100};
}

void expect_rate(const LrSchedule& schedule, int64_t tokens_seen, double expected) {
  EXPECT_NEAR(schedule.lr(tokens_seen, kTotal), expected, kRelative * expected)
      << "at " << tokens_seen;
}

TEST(LrSchedule, ExponentialMatchesPyTorch) {
  const LrSchedule s = schedule_of(ScheduleKind::kExponential);
  expect_rate(s, 100, 6e-4);
  expect_rate(s, 325, 0.00021558246717785174);
  expect_rate(s, 550, 7.745966692414906e-05);
  expect_rate(s, 775, 2.7831576837137814e-05);
  expect_rate(s, 1000, 1e-5);
}

TEST(LrSchedule, LinearMatchesPyTorch) {
  const LrSchedule s = schedule_of(ScheduleKind::kLinear);
  expect_rate(s, 100, 6e-4);
  expect_rate(s, 325, 0.0004525);
  expect_rate(s, 550, 0.000305);
  expect_rate(s, 1000, 1e-5);
}

TEST(LrSchedule, CosineMatchesPyTorch) {
  const LrSchedule s = schedule_of(ScheduleKind::kCosine);
  expect_rate(s, 100, 6e-4);
  expect_rate(s, 325, 0.0005135965004500315);
  expect_rate(s, 550, 0.000305);
  expect_rate(s, 775, 9.640349954996863e-05);
  expect_rate(s, 1000, 1e-5);
}

TEST(LrSchedule, ConstantStaysAtLrInit) {
  const LrSchedule s = schedule_of(ScheduleKind::kConstant);
  for (const int64_t tokens : {100, 550, 1000, 5000}) {
    EXPECT_EQ(s.lr(tokens, kTotal), 6e-4);
  }
}

TEST(LrSchedule, WarmupStableDecayFallsInAStraightLineAtTheEnd) {
  LrSchedule s = schedule_of(ScheduleKind::kWarmupStableDecay);
  s.decay_tokens = 200;
  EXPECT_EQ(s.lr(100, kTotal), 6e-4);
  EXPECT_EQ(s.lr(800, kTotal), 6e-4);
  expect_rate(s, 801, 6e-4 - (6e-4 - 1e-5) / 200);
  expect_rate(s, 900, (6e-4 + 1e-5) / 2);
  EXPECT_EQ(s.lr(1000, kTotal), 1e-5);
}

TEST(LrSchedule, WarmupMultipliesEveryKind) {
  for (const ScheduleKind kind : {ScheduleKind::kExponential,
                                  ScheduleKind::kLinear,
                                  ScheduleKind::kCosine,
                                  ScheduleKind::kConstant,
                                  ScheduleKind::kWarmupStableDecay}) {
    LrSchedule s = schedule_of(kind);
    s.decay_tokens = kind == ScheduleKind::kWarmupStableDecay ? 200 : 0;
    expect_rate(s, 0, 0.00012);
    expect_rate(s, 25, 0.00024);
    expect_rate(s, 50, 0.00036);
    expect_rate(s, 99, 0.0005952);
    expect_rate(s, 100, 0.0006);
  }
}

TEST(LrSchedule, WarmupStartIsTheFractionAtTheFirstToken) {
  LrSchedule s = schedule_of(ScheduleKind::kConstant);
  s.warmup_start = 0.01;  // RWKV-LM's v7 trainer
  expect_rate(s, 0, 6e-6);
  expect_rate(s, 50, 6e-4 * 0.505);
}

TEST(LrSchedule, StartsAtTheFullRateWithoutWarmup) {
  LrSchedule s = schedule_of(ScheduleKind::kCosine);
  s.warmup_tokens = 0;
  EXPECT_EQ(s.lr(0, kTotal), 6e-4);
}

TEST(LrSchedule, StaysWhereItIsPastTheEnd) {
  for (const ScheduleKind kind : {ScheduleKind::kExponential,
                                  ScheduleKind::kLinear,
                                  ScheduleKind::kCosine,
                                  ScheduleKind::kWarmupStableDecay}) {
    LrSchedule s = schedule_of(kind);
    s.decay_tokens = 200;
    expect_rate(s, kTotal + 1, 1e-5);
    expect_rate(s, std::numeric_limits<int64_t>::max(), 1e-5);
  }
}

TEST(LrSchedule, ExponentialIsLinearWhereOneEndIsZero) {
  LrSchedule down = schedule_of(ScheduleKind::kExponential);
  down.lr_final = 0;
  expect_rate(down, 550, 3e-4);
  EXPECT_EQ(down.lr(kTotal, kTotal), 0);
  LrSchedule up = schedule_of(ScheduleKind::kExponential);
  up.lr_init = 0;
  up.lr_final = 1e-3;
  expect_rate(up, 550, 5e-4);
}

TEST(LrSchedule, CosineRisesFromZero) {
  LrSchedule s = schedule_of(ScheduleKind::kCosine);
  s.lr_init = 0;
  s.lr_final = 1e-3;
  EXPECT_EQ(s.lr(100, kTotal), 0);
  expect_rate(s, 550, 5e-4);
}

TEST(LrSchedule, IsFiniteWhereNothingIsLeftAfterWarmup) {
  LrSchedule s = schedule_of(ScheduleKind::kExponential);
  EXPECT_DOUBLE_EQ(s.lr(50, 100), 6e-4 * 0.6);
  EXPECT_DOUBLE_EQ(s.lr(100, 100), 1e-5);
}

TEST(LrSchedule, RejectsValuesOutOfRange) {
  LrSchedule s;
  s.lr_init = -1;
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.lr_init = -1.0: must lie from 0.0 to 1e+38"));
  s = {.lr_final = std::nan("")};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.lr_final = nan: "));
  s = {.lr_init = std::numeric_limits<double>::infinity()};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.lr_init = inf: "));
  s = {.warmup_tokens = -5};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.warmup_tokens = -5: must be 0 or more"));
  s = {.warmup_start = 1.5};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.warmup_start = 1.5: must lie from 0.0 to 1.0"));
}

TEST(LrSchedule, RejectsDecayTokensThatWouldDoNothing) {
  LrSchedule s = {.kind = ScheduleKind::kCosine, .decay_tokens = 10};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              HasSubstr("only the kind \"warmup_stable_decay\""));
  s = {.kind = ScheduleKind::kWarmupStableDecay};
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate()),
              StartsWith("schedule.decay_tokens = 0: must be 1 or more"));
}

TEST(LrSchedule, RejectsPartsLongerThanTheRun) {
  LrSchedule s = {.kind = ScheduleKind::kWarmupStableDecay, .warmup_tokens = 100};
  s.decay_tokens = 900;
  s.validate_for(1000);
  s.decay_tokens = 901;
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate_for(1000)), HasSubstr("at most 900"));
  s.decay_tokens = std::numeric_limits<int64_t>::max();
  EXPECT_THROW(s.validate_for(1000), std::invalid_argument);
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, s.validate_for(100)),
              StartsWith("schedule.warmup_tokens = 100: the run has 100 tokens"));
}

}  // namespace
}  // namespace rwkv
