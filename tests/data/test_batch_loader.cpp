#include <chrono>
#include <memory>
#include <optional>
#include <set>
#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/batch_loader.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr int64_t kTokens = 1001;
constexpr int64_t kCtxLen = 8;

// A corpus whose token at position i is 3 i + 1.
class BatchLoaderTest : public testing::Test {
 protected:
  BatchLoaderTest() {
    BinidxWriter writer(folder_.path("a"), {"x", 65536, std::nullopt, 0});
    for (int32_t i = 0; i < kTokens; ++i) {
      writer.add_tokens(std::vector<int32_t>{3 * i + 1});
    }
    writer.end_document();
    writer.finish(1);
    file_.emplace(folder_.path("a"));
  }

  const BinidxFile& file() const { return *file_; }

  test::TempFolder folder_;
  std::optional<BinidxFile> file_;
  SampleOrder order_{SampleOrderKind::kShuffled, kTokens, kCtxLen, 5};
};

BatchPlan plan() {
  return {.rows = 4, .ctx_len = kCtxLen, .vocab_size = 65536};
}

// Row j of a batch holds the window of `sample`.
void expect_row(const Batch& batch, int64_t j, const SampleOrder& order, int64_t sample) {
  const int64_t begin = order.token_offset(sample);
  for (int64_t t = 0; t < kCtxLen; ++t) {
    const auto at = static_cast<size_t>(j * kCtxLen + t);
    ASSERT_EQ(batch.inputs[at], 3 * (begin + t) + 1);
    ASSERT_EQ(batch.targets[at], 3 * (begin + t + 1) + 1);
  }
}

TEST_F(BatchLoaderTest, GivesTheWindowsOfTheOrderEpochAfterEpoch) {
  BatchLoader loader(file(), order_, plan());
  ASSERT_EQ(order_.samples_per_epoch(), 125);
  for (int64_t sample = 0; sample < 400; sample += 4) {
    const Batch batch = loader.next();
    EXPECT_EQ(batch.first_sample, sample);
    EXPECT_EQ(batch.rows, 4);
    EXPECT_EQ(batch.ctx_len, kCtxLen);
    ASSERT_EQ(batch.inputs.size(), 4u * kCtxLen);
    ASSERT_EQ(batch.targets.size(), 4u * kCtxLen);
    for (int64_t j = 0; j < 4; ++j) {
      expect_row(batch, j, order_, sample + j);
    }
  }
}

TEST_F(BatchLoaderTest, StartsAnywhere) {
  BatchPlan from = plan();
  from.first_sample = 1'000'003;
  BatchLoader loader(file(), order_, from);
  loader.next();
  const Batch batch = loader.next();
  EXPECT_EQ(batch.first_sample, 1'000'007);
  expect_row(batch, 2, order_, 1'000'009);
}

// Several processes read together, step by step, what one reads alone; however the samples of a
// step divide, and in whatever batches.
TEST_F(BatchLoaderTest, SharesTheSamplesAmongProcesses) {
  constexpr int64_t kStepSamples = 13;
  for (const int64_t processes : {1, 2, 3, 8}) {
    std::vector<std::unique_ptr<BatchLoader>> loaders;
    std::vector<int64_t> shares;
    for (int64_t rank = 0; rank < processes; ++rank) {
      BatchPlan part = plan();
      part.rows = 2;
      part.step_samples = kStepSamples;
      part.first_share = rank * kStepSamples / processes;
      part.share = (rank + 1) * kStepSamples / processes - part.first_share;
      shares.push_back(part.share);
      loaders.push_back(std::make_unique<BatchLoader>(file(), order_, part));
    }
    for (int64_t step = 0; step < 30; ++step) {
      int64_t sample = step * kStepSamples;
      for (size_t rank = 0; rank < loaders.size(); ++rank) {
        for (int64_t left = shares[rank]; left > 0;) {
          const Batch batch = loaders[rank]->next();
          ASSERT_EQ(batch.rows, std::min<int64_t>(left, 2));
          ASSERT_EQ(batch.first_sample, sample) << processes << " processes, step " << step;
          for (int64_t j = 0; j < batch.rows; ++j) {
            expect_row(batch, j, order_, sample + j);
          }
          sample += batch.rows;
          left -= batch.rows;
        }
      }
    }
  }
}

TEST_F(BatchLoaderTest, DoesNotDependOnHowFarItReadsAhead) {
  for (const int64_t prefetch : {1, 2, 50}) {
    BatchPlan ahead = plan();
    ahead.prefetch_batches = prefetch;
    BatchLoader loader(file(), order_, ahead);
    for (int64_t sample = 0; sample < 200; sample += 4) {
      expect_row(loader.next(), 3, order_, sample + 3);
    }
  }
}

TEST_F(BatchLoaderTest, NamesATokenThatTheModelDoesNotHave) {
  const SampleOrder sequential(SampleOrderKind::kSequential, kTokens, kCtxLen, 0);
  BatchPlan small = plan();
  // Position 666 is the first with an id of 1999 or more; sample 83 covers 664 .. 672.
  small.vocab_size = 1999;
  small.prefetch_batches = 50;
  BatchLoader loader(file(), sequential, small);
  // Time for the thread to meet the error while the batches before it still wait.
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  for (int64_t sample = 0; sample < 80; sample += 4) {
    ASSERT_EQ(loader.next().first_sample, sample) << "batches before the error still come";
  }
  for (int again = 0; again < 3; ++again) {
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, loader.next()),
                AllOf(HasSubstr(folder_.path("a.bin")),
                      HasSubstr("position 666 has id 1999"),
                      HasSubstr("1,999 ids (0 to 1998)")));
  }
}

TEST_F(BatchLoaderTest, RefusesNegativeIds) {
  // As type i16, ids from 32768 on turn negative.
  std::string idx = test::read_file(folder_.path("a.idx"));
  idx[17] = 3;
  test::write_file(folder_.path("b.idx"), idx);
  std::string bin = test::read_file(folder_.path("a.bin"));
  bin[1] = '\x80';
  test::write_file(folder_.path("b.bin"), bin);
  const BinidxFile negative(folder_.path("b"));
  const SampleOrder sequential(SampleOrderKind::kSequential, kTokens, kCtxLen, 0);
  BatchLoader loader(negative, sequential, plan());
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, loader.next()),
              HasSubstr("position 0 has id -32767"));
}

TEST_F(BatchLoaderTest, RefusesAnOrderMadeForALongerCorpus) {
  const SampleOrder longer(SampleOrderKind::kSequential, 10 * kTokens, kCtxLen, 0);
  BatchPlan at_end = plan();
  at_end.first_sample = 1200;
  BatchLoader loader(file(), longer, at_end);
  EXPECT_THROW(loader.next(), std::out_of_range);
}

TEST_F(BatchLoaderTest, RefusesPlansThatMakeNoSense) {
  const auto expect_refused = [&](const BatchPlan& bad, const std::string& name) {
    EXPECT_THAT(THROWN_TEXT(std::invalid_argument, BatchLoader(file(), order_, bad)),
                HasSubstr(name));
  };
  BatchPlan bad = plan();
  bad.rows = 0;
  expect_refused(bad, "rows = 0");
  bad = plan();
  bad.ctx_len = 7;
  expect_refused(bad, "ctx_len = 7, but the order of samples was made for 8");
  bad = plan();
  bad.first_sample = -1;
  expect_refused(bad, "first_sample = -1");
  bad = plan();
  bad.step_samples = 4;
  bad.first_share = 1;
  bad.share = 4;
  expect_refused(bad, "a share of 4 from 1 is beyond the 4 samples of a step");
  bad = plan();
  bad.vocab_size = 0;
  expect_refused(bad, "vocab_size = 0");
  bad = plan();
  bad.prefetch_batches = 0;
  expect_refused(bad, "prefetch_batches = 0");
}

TEST_F(BatchLoaderTest, EndsWhileItsThreadReadsOrWaits) {
  for (int i = 0; i < 200; ++i) {
    // At once: the thread is about to read. Later: it has read ahead all it may, and waits.
    BatchLoader loader(file(), order_, plan());
    if (i % 4 == 1) {
      loader.next();
    }
    if (i % 50 == 2) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
}

TEST_F(BatchLoaderTest, EndsAfterAnErrorThatNobodySaw) {
  for (int i = 0; i < 20; ++i) {
    BatchPlan small = plan();
    small.vocab_size = 1;
    BatchLoader loader(file(), order_, small);
    if (i % 2 == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
}

TEST_F(BatchLoaderTest, CountsTheTimeThatItsConsumerWaited) {
  BatchPlan large = plan();
  large.rows = 200'000;
  BatchLoader loader(file(), order_, large);
  EXPECT_EQ(loader.wait_seconds(), 0);
  const auto start = std::chrono::steady_clock::now();
  loader.next();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  const double waited = loader.wait_seconds();
  EXPECT_GT(waited, 0);
  EXPECT_LE(waited, elapsed.count());
}

TEST_F(BatchLoaderTest, CountsNoTimeWhereBatchesAreReady) {
  // A busy machine may not run the thread within a pause: longer ones are tried.
  double waited = -1;
  for (int pause_ms = 50; pause_ms <= 3200 && waited != 0; pause_ms *= 2) {
    BatchLoader loader(file(), order_, plan());
    std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
    for (int64_t i = 0; i < plan().prefetch_batches; ++i) {
      loader.next();
    }
    waited = loader.wait_seconds();
  }
  EXPECT_EQ(waited, 0);
}

}  // namespace
}  // namespace rwkv
