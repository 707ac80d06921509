#include <cmath>
#include <csignal>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include "tests/support/test_data.h"
#include "train/metrics.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

StepRecord sample_record() {
  return {.step = 120,
          .total_steps = 4000,
          .tokens = 3'072'000,
          .loss = 2.34564,
          .smoothed_loss = 2.40116,
          .lr = 5.98e-4,
          .grad_norm = 0.8123,
          .tokens_per_s = 45123.4,
          .seconds_left = 3725,
          .data_wait = 0.004,
          .mfu = 0.617,
          .memory_bytes = 1'213'000'000,
          .elapsed_s = 90.5,
          .time = 1.8e9};
}

TEST(StepLine, ShowsEverythingInItsUnit) {
  EXPECT_EQ(format_step_line(sample_record()),
            "step   120/4,000 | 3.07M tokens | loss 2.3456 (avg 2.4012) | lr 5.98e-04 | grad 0.81 "
            "| 45,123 tok/s | mfu 62% | data 0% | 1.21 GB | 1h02m left");
}

TEST(StepLine, CountsAloneWhereTheRunHasNoLastStep) {
  StepRecord record = sample_record();
  record.total_steps.reset();
  EXPECT_THAT(format_step_line(record), StartsWith("step 120 | "));
}

TEST(StepLine, ShowsAValidation) {
  StepRecord record = sample_record();
  record.validation_loss = 2.29104;
  EXPECT_THAT(format_step_line(record), testing::EndsWith("1h02m left | val 2.2910"));
}

TEST(StepLine, LeavesOutWhatIsNotKnown) {
  StepRecord record = sample_record();
  record.tokens_per_s.reset();
  record.seconds_left.reset();
  record.data_wait.reset();
  record.mfu.reset();
  record.memory_bytes.reset();
  EXPECT_THAT(format_step_line(record), testing::EndsWith("| grad 0.81"));
}

TEST(StepLine, GrowsWithLargeNumbers) {
  StepRecord record = sample_record();
  record.step = 1'234'567;
  record.total_steps = record.step;
  record.tokens_per_s = 1e6;
  EXPECT_THAT(format_step_line(record),
              AllOf(StartsWith("step 1,234,567/1,234,567 |"), HasSubstr("| 1,000,000 tok/s |")));
}

TEST(StepLine, LeavesOutWholeFieldsWhereItIsNarrow) {
  const StepRecord record = sample_record();
  const std::string whole = format_step_line(record);
  EXPECT_EQ(format_step_line(record, whole.size()), whole);
  // What a narrower line does without, one after the other.
  std::string line = whole;
  for (const std::string field : {" | 3.07M tokens",
                                  " | 1.21 GB",
                                  " | data 0%",
                                  " | lr 5.98e-04",
                                  " | grad 0.81",
                                  " | mfu 62%",
                                  " (avg 2.4012)"}) {
    const size_t wider = line.size();
    ASSERT_NE(line.find(field), line.npos) << field;
    line.erase(line.find(field), field.size());
    EXPECT_EQ(format_step_line(record, wider - 1), line);
  }
  EXPECT_EQ(line, "step   120/4,000 | loss 2.3456 | 45,123 tok/s | 1h02m left");
  EXPECT_EQ(format_step_line(record, 10), line) << "the rest stays";
}

TEST(StepLine, OfAShortRunHasTheMostNeededIn80Columns) {
  StepRecord record = sample_record();
  record.step = 400;
  record.total_steps = 800;
  record.seconds_left = 42;
  EXPECT_EQ(format_step_line(record, 79),
            "step 400/800 | loss 2.3456 (avg 2.4012) | 45,123 tok/s | mfu 62% | 42s left");
}

TEST(Duration, HasTwoUnits) {
  EXPECT_EQ(format_duration(0), "0s");
  EXPECT_EQ(format_duration(59.4), "59s");
  EXPECT_EQ(format_duration(59.6), "1m00s");
  EXPECT_EQ(format_duration(725), "12m05s");
  EXPECT_EQ(format_duration(3599.6), "1h00m");
  EXPECT_EQ(format_duration(3 * 3600 + 7 * 60 + 59), "3h07m");
  EXPECT_EQ(format_duration(86399), "23h59m");
  EXPECT_EQ(format_duration(2 * 86400 + 4 * 3600 + 3599), "2d04h");
  EXPECT_EQ(format_duration(1e300), format_duration(1e9));
}

TEST(Count, HasThreeDigits) {
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(1000), "1.00k");
  EXPECT_EQ(format_count(9'994), "9.99k");
  EXPECT_EQ(format_count(9'996), "10.0k");
  EXPECT_EQ(format_count(99'960), "100k");
  EXPECT_EQ(format_count(999'499), "999k");
  EXPECT_EQ(format_count(999'500), "1.00M");
  EXPECT_EQ(format_count(1'500'000'000), "1.50G");
  EXPECT_EQ(format_count(2'000'000'000'000'000), "2000T");
}

// What a run of `total_steps` knows of a step by itself.
StepRecord after(int64_t step, int64_t tokens, double loss, int64_t total_steps = 10) {
  return {.step = step, .total_steps = total_steps, .tokens = tokens, .loss = loss, .lr = 1e-3};
}

TEST(ProgressMeter, MeasuresSpeedAndTimeLeft) {
  ProgressMeter meter(0, 100.0);
  const StepRecord first = meter.finish_step(after(1, 512, 5.5), 102.0, 0.5);
  EXPECT_EQ(first.step, 1);
  EXPECT_EQ(first.total_steps, 10);
  EXPECT_EQ(first.tokens, 512);
  EXPECT_EQ(first.loss, 5.5);
  EXPECT_EQ(first.lr, 1e-3);
  EXPECT_EQ(first.tokens_per_s, 256.0);
  EXPECT_EQ(first.data_wait, 0.25);
  EXPECT_EQ(first.seconds_left, 18.0);
  const StepRecord second = meter.finish_step(after(2, 1024, 5.0), 106.0, 3.0);
  EXPECT_DOUBLE_EQ(*second.tokens_per_s, 1024.0 / 6);
  EXPECT_DOUBLE_EQ(*second.data_wait, 0.5);
  EXPECT_DOUBLE_EQ(*second.seconds_left, 8 * 3.0);
}

TEST(ProgressMeter, KnowsNoTimeLeftWithoutAnEnd) {
  ProgressMeter meter(0, 0.0);
  StepRecord endless = after(1, 64, 1);
  endless.total_steps.reset();
  const StepRecord record = meter.finish_step(endless, 1.0, 0);
  EXPECT_EQ(record.tokens_per_s, 64.0);
  EXPECT_EQ(record.seconds_left, std::nullopt);
}

TEST(ProgressMeter, ForgetsOldSpeed) {
  ProgressMeter meter(0, 0.0);
  double now_s = 0;
  StepRecord record;
  // A slow start: ten steps of 100 s, then 32 of 1 s.
  for (int64_t step = 1; step <= 42; ++step) {
    now_s += step <= 10 ? 100 : 1;
    record = meter.finish_step(after(step, step * 64, 1, 1000), now_s, 0);
    if (step == 41) {
      EXPECT_LT(*record.tokens_per_s, 64.0);
    }
  }
  EXPECT_DOUBLE_EQ(*record.tokens_per_s, 64.0);
  EXPECT_DOUBLE_EQ(*record.seconds_left, 958.0);
}

TEST(ProgressMeter, CountsOnlyItsOwnTokensAfterAResume) {
  ProgressMeter meter(50 * 64, 7.0);
  const StepRecord record = meter.finish_step(after(51, 51 * 64, 1, 100), 8.0, 0);
  EXPECT_DOUBLE_EQ(*record.tokens_per_s, 64.0);
  EXPECT_DOUBLE_EQ(*record.seconds_left, 49.0);
}

TEST(ProgressMeter, LeavesPausesOutOfTheSpeedAndInTheTimeLeft) {
  ProgressMeter meter(0, 0.0);
  meter.finish_step(after(1, 64, 1), 1.0, 0);
  meter.exclude_seconds(60.0);
  const StepRecord record = meter.finish_step(after(2, 128, 1), 62.0, 0);
  EXPECT_DOUBLE_EQ(*record.tokens_per_s, 64.0);
  EXPECT_DOUBLE_EQ(*record.seconds_left, 8 * (1.0 + 60.0 / 2));
}

TEST(ProgressMeter, CountsOnPausesThatLieFurtherApartThanItMeasuresTheSpeed) {
  ProgressMeter meter(0, 0.0);
  double now_s = 0;
  StepRecord record;
  for (int64_t step = 1; step <= 150; ++step) {
    now_s += 1;
    record = meter.finish_step(after(step, step * 64, 1, 1000), now_s, 0);
    if (step % 75 == 0) {
      meter.exclude_seconds(30.0);
      now_s += 30;
    }
  }
  EXPECT_DOUBLE_EQ(*record.tokens_per_s, 64.0);
  EXPECT_DOUBLE_EQ(*record.seconds_left, 850 * (1.0 + 30.0 / 150));
}

TEST(ProgressMeter, KnowsNoSpeedBeforeTimeHasPassed) {
  ProgressMeter meter(0, 5.0);
  const StepRecord record = meter.finish_step(after(1, 64, 1), 5.0, 0);
  EXPECT_EQ(record.tokens_per_s, std::nullopt);
  EXPECT_EQ(record.seconds_left, std::nullopt);
}

TEST(ProgressMeter, SmoothsTheLossWithoutPullingItTowardsZero) {
  ProgressMeter meter(0, 0.0);
  EXPECT_DOUBLE_EQ(meter.finish_step(after(1, 1, 4.0), 1, 0).smoothed_loss, 4.0);
  // (0.98 * 4 + 2) / (0.98 + 1)
  EXPECT_DOUBLE_EQ(meter.finish_step(after(2, 2, 2.0), 2, 0).smoothed_loss, 5.92 / 1.98);
  StepRecord record;
  for (int64_t step = 3; step <= 1000; ++step) {
    record = meter.finish_step(after(step, step, 1.0, 1000), static_cast<double>(step), 0);
  }
  EXPECT_NEAR(record.smoothed_loss, 1.0, 1e-6);
}

TEST(ProgressMeter, GoesOnFromASmoothedLossAsIfItHadNotBeenInterrupted) {
  const auto loss_at = [](int64_t step) { return 2.0 + 1.0 / static_cast<double>(step); };
  for (const int64_t resumed : {1, 7, 400}) {
    ProgressMeter whole(0, 0.0);
    double smoothed = 0;
    for (int64_t step = 1; step <= resumed; ++step) {
      smoothed = whole.finish_step(after(step, step, loss_at(step)), 0, 0).smoothed_loss;
    }
    ProgressMeter meter(resumed, 0.0, SmoothedLoss{.step = resumed, .value = smoothed});
    for (int64_t step = resumed + 1; step <= resumed + 3; ++step) {
      const StepRecord record = after(step, step, loss_at(step));
      EXPECT_NEAR(meter.finish_step(record, 0, 0).smoothed_loss,
                  whole.finish_step(record, 0, 0).smoothed_loss,
                  1e-12);
    }
  }
}

StepRecord record_of(int64_t step) {
  return {.step = step, .total_steps = 9, .tokens = step * 64, .loss = 0.1, .smoothed_loss = 0.2};
}

TEST(StepFile, HoldsOneObjectAStep) {
  const test::TempFolder folder;
  StepFile file(folder.path("metrics.jsonl"), 0);
  StepRecord record = sample_record();
  record.validation_loss = 1.0 / 3;
  file.append(record.step, to_json(record));
  file.append(121, to_json(record_of(121)));
  // Readable while the run goes on.
  EXPECT_EQ(test::read_file(folder.path("metrics.jsonl")),
            "{\"step\":120,\"total_steps\":4000,\"tokens\":3072000,\"loss\":2.34564,"
            "\"smoothed_loss\":2.40116,\"lr\":0.000598,\"grad_norm\":0.8123,"
            "\"tokens_per_s\":45123.4,\"data_wait\":0.004,\"mfu\":0.617,"
            "\"memory_bytes\":1213000000,\"seconds_left\":3725.0,"
            "\"validation_loss\":0.3333333333333333,\"elapsed_s\":90.5,\"time\":1800000000.0}\n"
            "{\"step\":121,\"total_steps\":9,\"tokens\":7744,\"loss\":0.1,\"smoothed_loss\":0.2,"
            "\"lr\":0.0,\"grad_norm\":0.0,\"elapsed_s\":0.0,\"time\":0.0}\n");
}

TEST(ToJson, TelemetryIsByLayerAndHead) {
  StepRecord record = record_of(3);
  record.telemetry =
      Telemetry{.largest_logit = 2.5, .by_layer = {{"state_norm", {{1, 2}, {0.5, std::nan("")}}}}};
  EXPECT_THAT(
      to_json(record),
      HasSubstr(R"("telemetry":{"largest_logit":2.5,"state_norm":[[1.0,2.0],[0.5,null]]},)"));
}

TEST(StepFile, HoldsEachStepOnceAfterAResume) {
  const test::TempFolder folder;
  const std::string path = folder.path("metrics.jsonl");
  const auto write_steps = [&](int64_t resumed_step, int64_t last_step) {
    StepFile file(path, resumed_step);
    for (int64_t step = resumed_step + 1; step <= last_step; ++step) {
      file.append(step, to_json(record_of(step)));
    }
  };
  write_steps(0, 5);
  const std::string uninterrupted = test::read_file(path);
  write_steps(3, 5);
  EXPECT_EQ(test::read_file(path), uninterrupted);
  write_steps(5, 5);
  EXPECT_EQ(test::read_file(path), uninterrupted);
  write_steps(0, 5);
  EXPECT_EQ(test::read_file(path), uninterrupted);
  EXPECT_THAT(folder.files(), ElementsAre("metrics.jsonl"));
}

TEST(StepFile, HasTheLastLineThatItKept) {
  const test::TempFolder folder;
  const std::string path = folder.path("metrics.jsonl");
  EXPECT_EQ(StepFile(path, 9).last_kept_line(), "");
  test::write_file(path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n{\"step\":4");
  EXPECT_EQ(StepFile(path, 2).last_kept_line(), "{\"step\":2}");
  EXPECT_EQ(StepFile(path, 1).last_kept_line(), "{\"step\":1}");
  EXPECT_EQ(StepFile(path, 0).last_kept_line(), "");
}

TEST(StepFile, DropsALastLineThatWasCut) {
  const test::TempFolder folder;
  const std::string path = folder.path("metrics.jsonl");
  test::write_file(path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3,\"lo");
  StepFile(path, 9);
  EXPECT_EQ(test::read_file(path), "{\"step\":1}\n{\"step\":2}\n");
  // Even one that would parse: a number may lack digits.
  test::write_file(path, "{\"step\":1}\n{\"step\":2}");
  StepFile(path, 9).append(2, to_json(record_of(2)));
  EXPECT_THAT(test::read_file(path), StartsWith("{\"step\":1}\n{\"step\":2,\"total_steps\":9"));
}

TEST(StepFile, NamesALineThatIsNotItsOwn) {
  const test::TempFolder folder;
  const std::string path = folder.path("metrics.jsonl");
  for (const char* line :
       {"notes", "[1]", "{\"epoch\":1}", "{\"step\":\"x\"}", "", "{\"step\":1"}) {
    const std::string text = "{\"step\":1}\n" + std::string(line) + "\n{\"step\":3}\n";
    test::write_file(path, text);
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, StepFile(path, 1)),
                StartsWith(path + ":2: \"" + line + "\" is not a JSON object with a \"step\""));
    EXPECT_EQ(test::read_file(path), text) << "the file is left as it was";
  }
}

TEST(StepFile, NamesAFolderThatIsNotThere) {
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, StepFile("/nonexistent/metrics.jsonl", 0)),
              StartsWith("/nonexistent/metrics.jsonl: cannot be opened"));
}

TEST(StepFile, ReportsALineThatCannotBeWritten) {
  const test::TempFolder folder;
  StepFile file(folder.path("metrics.jsonl"), 0);
  // A limit on the size of files stands in for a full disk.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = 10;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &tight), 0);
  std::string text;
  try {
    file.append(7, to_json(record_of(7)));
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_THAT(text, HasSubstr("metrics.jsonl: writing the line of step 7 failed"));
}

}  // namespace
}  // namespace rwkv
