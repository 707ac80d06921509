#include <filesystem>
#include <map>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/event_file.h"
#include "train/run_log.h"

namespace rwkv {
namespace {

using testing::IsEmpty;

class RunLogTest : public testing::Test {
 protected:
  RunLog open(int64_t resumed_step = 0) const {
    RunConfig config;
    config.train.run_dir = folder_.path();
    config.train.tensorboard = false;
    return RunLog(config, resumed_step, 1.8e9);
  }
  std::string metrics() const { return test::read_file(folder_.path("metrics.jsonl")); }

  test::TempFolder folder_;
};

StepRecord record_of(int64_t step) {
  return {.step = step, .tokens = 64 * step, .loss = 2, .smoothed_loss = 2.5};
}

std::string line_of(int64_t step) {
  return to_json(record_of(step)) + "\n";
}

TEST_F(RunLogTest, RemembersALastStepThatWasOnlyShown) {
  RunLog log = open();
  log.add(record_of(1));
  log.show(record_of(2));
  log.show(record_of(3));
  EXPECT_EQ(metrics(), line_of(1));
  log.add_shown();
  EXPECT_EQ(metrics(), line_of(1) + line_of(3));
}

TEST_F(RunLogTest, WritesTelemetryAsMeanAndMaximumOverHeads) {
  RunConfig config;
  config.train.run_dir = folder_.path();
  StepRecord record = record_of(4);
  record.telemetry = Telemetry{.largest_logit = 7, .by_layer = {{"state_norm", {{1, 3}, {4, 6}}}}};
  RunLog(config, 0, 1.8e9).add(record);
  std::map<std::string, double> scalars;
  for (const auto& file : std::filesystem::directory_iterator(folder_.path("tensorboard"))) {
    EventReader reader(file.path());
    while (const auto event = reader.next()) {
      for (const EventValue& value : event->values) {
        scalars[value.tag] = value.scalar.value_or(0);
      }
    }
  }
  EXPECT_EQ(scalars["telemetry/largest_logit"], 7);
  EXPECT_EQ(scalars["telemetry/state_norm_mean/layer_0"], 2);
  EXPECT_EQ(scalars["telemetry/state_norm_max/layer_0"], 3);
  EXPECT_EQ(scalars["telemetry/state_norm_max/layer_1"], 6);
}

TEST_F(RunLogTest, RemembersNoStepTwice) {
  RunLog log = open();
  log.add_shown();
  EXPECT_THAT(metrics(), IsEmpty());
  log.show(record_of(1));
  log.add(record_of(2));
  log.add_shown();
  EXPECT_EQ(metrics(), line_of(2));
  log.show(record_of(3));
  log.add_shown();
  log.add_shown();
  EXPECT_EQ(metrics(), line_of(2) + line_of(3));
}

TEST_F(RunLogTest, HandsOverTheSmoothedLossOfTheLastRowThatItKeeps) {
  EXPECT_FALSE(open().smoothed_loss());
  test::write_file(folder_.path("metrics.jsonl"),
                   "{\"step\":10,\"smoothed_loss\":3.5}\n{\"step\":20,\"smoothed_loss\":3.25}\n"
                   "{\"step\":30,\"smoothed_loss\":3.0}\n");
  const auto before = open(25).smoothed_loss();
  ASSERT_TRUE(before);
  EXPECT_EQ(before->step, 20);
  EXPECT_EQ(before->value, 3.25);
  test::write_file(folder_.path("metrics.jsonl"), "{\"step\":10,\"loss\":3.5}\n");
  EXPECT_FALSE(open(25).smoothed_loss());
}

}  // namespace
}  // namespace rwkv
