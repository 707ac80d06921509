#include <cmath>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/report/report_page.h"
#include "train/report/run_record.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::Pair;
using testing::StartsWith;

class RunRecordTest : public testing::Test {
 protected:
  void put(const std::string& name, const std::string& text) {
    test::write_file(folder_.path(name), text);
  }
  RunRecord read() const { return read_run(folder_.path()); }

  test::TempFolder folder_;
};

TEST_F(RunRecordTest, HoldsWhatTheFilesSay) {
  put("metrics.jsonl",
      "{\"step\":1,\"tokens\":256,\"loss\":5.5,\"lr\":1e-3,\"unknown\":[1]}\n"
      "{\"step\":2,\"tokens\":512,\"loss\":null,\"memory_bytes\":1048576}\n");
  put("samples.jsonl", "{\"step\":2,\"tokens\":512,\"prompt\":\"a\",\"text\":\"b\\n\"}\n");
  put("starts.jsonl", "{\"time\":1700000000.5,\"step\":1,\"processor\":\"P\",\"cores\":2}\n");
  put("config.toml",
      "[model]\nn_layer = 4\nversion = \"rwkv4\"  # a comment\n[schedule]\nlr = 4e-3\n");
  const RunRecord record = read();
  EXPECT_THAT(record.metrics.column(Metric::kStep), ElementsAre(1, 2));
  EXPECT_THAT(record.metrics.column(Metric::kLoss), ElementsAre(5.5, testing::IsNan()));
  EXPECT_EQ(record.metrics.last(Metric::kLr), 1e-3);
  EXPECT_TRUE(std::isnan(record.metrics.last(Metric::kMfu)));
  ASSERT_EQ(record.samples.size(), 1U);
  EXPECT_EQ(record.samples[0].text, "b\n");
  ASSERT_EQ(record.starts.size(), 1U);
  EXPECT_EQ(record.starts[0].time_s, 1700000000.5);
  EXPECT_EQ(find(record.starts[0].facts, "cores"), "2");
  EXPECT_THAT(record.config,
              ElementsAre(Pair("model.n_layer", "4"),
                          Pair("model.version", "\"rwkv4\""),
                          Pair("schedule.lr", "0.004")));
  EXPECT_THAT(record.notes, IsEmpty());
}

TEST_F(RunRecordTest, NotesBrokenLinesAndGoesOn) {
  put("metrics.jsonl", "{\"step\":1}\nnonsense\n{\"loss\":1}\n[]\n{\"step\":2}\n{\"step\":3,\"lo");
  put("starts.jsonl", "7\n");
  put("config.toml", "[model\n");
  const RunRecord record = read();
  EXPECT_THAT(record.metrics.column(Metric::kStep), ElementsAre(1, 2));
  EXPECT_THAT(
      record.notes,
      ElementsAre(folder_.path("metrics.jsonl") +
                      ":2: is no line that a run writes, nor are 2 more; left out",
                  folder_.path("starts.jsonl") + ":1: is no line that a run writes; left out",
                  StartsWith(folder_.path("config.toml") + ":1: ")));
}

TEST_F(RunRecordTest, TakesALaterLineForAStepThatWasRunAgain) {
  put("metrics.jsonl",
      "{\"step\":1,\"loss\":1}\n{\"step\":2,\"loss\":2}\n{\"step\":3,\"loss\":3}\n"
      "{\"step\":2,\"loss\":9}\n");
  EXPECT_THAT(read().metrics.column(Metric::kLoss), ElementsAre(1, 9));
}

TEST_F(RunRecordTest, HasTheFolderForANameWhereNamesAreTheSame) {
  std::vector<RunRecord> runs(3, RunRecord{});
  const char* folders[] = {"a/run", "b/run", "b/other"};
  const char* names[] = {"run", "run", "other"};
  for (size_t i = 0; i < runs.size(); ++i) {
    runs[i].folder = folders[i];
    runs[i].name = names[i];
  }
  tell_apart(runs);
  EXPECT_EQ(runs[0].name, "a/run");
  EXPECT_EQ(runs[1].name, "b/run");
  EXPECT_EQ(runs[2].name, "other");
}

TEST_F(RunRecordTest, NeedsMetrics) {
  EXPECT_EQ(
      THROWN_TEXT(std::runtime_error, read()),
      folder_.path() +
          ": holds no metrics.jsonl; give the folder of a run, which `rookery train` names as "
          "train.run_dir");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_run(folder_.path("none"))),
              HasSubstr("none: is no folder; give"));
}

TEST_F(RunRecordTest, MakesAPageWithoutAStep) {
  put("metrics.jsonl", "");
  const RunRecord record = read();
  EXPECT_THAT(make_report({&record, 1}), HasSubstr("No step has been logged yet."));
  EXPECT_THROW(make_report({}), std::invalid_argument);
}

TEST_F(RunRecordTest, MakesASmallPageOfALongRun) {
  std::string lines;
  for (int step = 1; step <= 200'000; ++step) {
    const std::string value = std::to_string(1 + (step * 7919 % 1000) / 1000.0);
    lines += "{\"step\":" + std::to_string(step) + ",\"tokens\":" + std::to_string(step) +
             ",\"loss\":" + value + ",\"smoothed_loss\":" + value + ",\"grad_norm\":" + value +
             ",\"tokens_per_s\":" + value + ",\"data_wait\":" + value + "}\n";
  }
  put("metrics.jsonl", lines);
  const std::vector<RunRecord> runs(12, read());
  EXPECT_LT(make_report({runs.data(), 1}).size(), 500'000U);
  EXPECT_LT(make_report(runs).size(), 2'000'000U);
}

}  // namespace
}  // namespace rwkv
