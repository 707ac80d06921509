#include <cmath>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/version_shapes.h"
#include "train/metrics.h"
#include "train/plan.h"
#include "train/plan_report.h"
#include "train/plan_time.h"

namespace rwkv {
namespace {

using testing::ContainsRegex;
using testing::EndsWith;
using testing::HasSubstr;
using testing::Not;
using testing::StartsWith;
using testing::ThrowsMessage;

ModelConfig model_of(int64_t n_layer,
                     int64_t n_embd,
                     int64_t vocab_size,
                     int64_t ctx_len,
                     const std::string& version = "rwkv4") {
  ModelConfig model{.version = version,
                    .n_layer = n_layer,
                    .n_embd = n_embd,
                    .vocab_size = vocab_size,
                    .ctx_len = ctx_len};
  find_version_shapes(model.version).resolve(model);
  return model;
}

// A row of tests/bench/results/gpu_h100_2026-11.md.
struct Measured {
  const char* name;
  ModelConfig model;
  int64_t batch_size;
  TrainDtype dtype;
  Recompute recompute;
  double ms;
  double peak_mb = 0;
};

void PrintTo(const Measured& row, std::ostream* out) {
  *out << row.name;
}

StepPlan plan_of(const Measured& row) {
  return {.model = row.model,
          .micro_batch_size = row.batch_size,
          .dtype = row.dtype,
          .recompute = row.recompute,
          .device = PlanDevice::kCuda};
}

class PlanOfAnH100 : public testing::TestWithParam<Measured> {};

TEST_P(PlanOfAnH100, HasTheBytesThatWereMeasured) {
  const double planned = plan_memory(plan_of(GetParam())).tensor_bytes();
  EXPECT_NEAR(planned / (GetParam().peak_mb * 1e6), 1, 0.01);
}

TEST_P(PlanOfAnH100, HasTheTimeThatWasMeasured) {
  const double planned = plan_time(plan_of(GetParam()), find_gpu_rates("h100")).step_ms();
  EXPECT_NEAR(planned / GetParam().ms, 1, 0.1) << planned << " ms";
}

using enum TrainDtype;
using enum Recompute;
INSTANTIATE_TEST_SUITE_P(
    Rows,
    PlanOfAnH100,
    testing::Values(
        Measured{"L12_B16", model_of(12, 768, 50277, 1024), 16, kBf16, kNone, 31.4, 8343},
        Measured{"L12_B16_blocks", model_of(12, 768, 50277, 1024), 16, kBf16, kBlocks, 39.4, 3466},
        Measured{"L24_B8_mixes", model_of(24, 2048, 50277, 1024), 8, kBf16, kMixes, 138, 32171},
        Measured{"L12_B64_mixes", model_of(12, 768, 50277, 1024), 64, kBf16, kMixes, 116, 18176},
        Measured{"L12_T4096_mixes", model_of(12, 768, 50277, 4096), 16, kBf16, kMixes, 118, 18157},
        Measured{"L12_T65536_mixes", model_of(12, 768, 50277, 65536), 1, kBf16, kMixes, 123, 18150},
        Measured{"S", model_of(6, 384, 256, 256), 8, kBf16, kNone, 1.65, 406},
        Measured{"M", model_of(12, 768, 50277, 128), 4, kBf16, kNone, 5.00, 2812},
        Measured{"L12_fp32_mixes", model_of(12, 768, 50277, 1024), 16, kFp32, kMixes, 283, 11038},
        Measured{"rwkv7_L12_B16",
                 model_of(12, 768, 50277, 1024, "rwkv7"),
                 16,
                 kBf16,
                 kNone,
                 64.3,
                 13022},
        Measured{"rwkv7_L12_T4096",
                 model_of(12, 768, 50277, 4096, "rwkv7"),
                 4,
                 kBf16,
                 kNone,
                 104,
                 12922},
        Measured{"rwkv7_L24_B8_mixes",
                 model_of(24, 2048, 50277, 1024, "rwkv7"),
                 8,
                 kBf16,
                 kMixes,
                 212,
                 42391}),
    [](const auto& row) { return std::string(row.param.name); });

// ---- States -------------------------------------------------------------------------------------

class PlanMemory : public testing::Test {
 protected:
  StepPlan plan_{.model = model_of(4, 64, 1000, 32),
                 .micro_batch_size = 2,
                 .dtype = kBf16,
                 .device = PlanDevice::kCuda,
                 .processes = 4};
  double parameters_ = static_cast<double>(count_parameters(plan_.model, {}).all);

  double per_parameter(MemoryKind kind) const { return plan_memory(plan_)[kind] / parameters_; }
};

TEST_F(PlanMemory, CountsTheBytesOfAParameter) {
  EXPECT_EQ(per_parameter(MemoryKind::kWeights), 2);
  EXPECT_EQ(per_parameter(MemoryKind::kMasters), 2);
  EXPECT_EQ(per_parameter(MemoryKind::kGradients), 2);
  EXPECT_EQ(per_parameter(MemoryKind::kMoments), 8);
  // What several passes sum up is fp32.
  plan_.micro_batches = 2;
  EXPECT_EQ(per_parameter(MemoryKind::kGradients), 4);
  plan_.device = PlanDevice::kCpu;
  plan_.micro_batches = 1;
  EXPECT_EQ(per_parameter(MemoryKind::kMasters), 4);
  EXPECT_EQ(per_parameter(MemoryKind::kGradients), 4);
  plan_.dtype = kFp32;
  EXPECT_EQ(per_parameter(MemoryKind::kWeights), 4);
  EXPECT_EQ(per_parameter(MemoryKind::kMasters), 0);
}

TEST_F(PlanMemory, SharesOutWhatTheStageSays) {
  plan_.zero_stage = 1;
  EXPECT_EQ(per_parameter(MemoryKind::kWeights), 2);
  EXPECT_EQ(per_parameter(MemoryKind::kMasters), 0.5);
  EXPECT_EQ(per_parameter(MemoryKind::kMoments), 2);
  EXPECT_EQ(per_parameter(MemoryKind::kGradients), 2);
  // All of a model this small is one bucket.
  plan_.zero_stage = 2;
  EXPECT_EQ(per_parameter(MemoryKind::kGradients), 0.5 + 2);
  // A large one has as many in hand as the embedding's gradient lies in, or four: the 393 MiB of
  // this one are four, and a border.
  plan_.model = model_of(32, 4096, 50277, 1024);
  const auto all = static_cast<double>(count_parameters(plan_.model, {}).all);
  EXPECT_EQ(plan_memory(plan_)[MemoryKind::kGradients], all * 2 / 4 + 5 * 100.0 * (1 << 20));
  plan_.model = model_of(32, 2048, 50277, 1024);
  const auto fewer = static_cast<double>(count_parameters(plan_.model, {}).all);
  EXPECT_EQ(plan_memory(plan_)[MemoryKind::kGradients], fewer * 2 / 4 + 4 * 100.0 * (1 << 20));
}

TEST_F(PlanMemory, GivesFrozenTensorsNeitherGradientNorMoments) {
  plan_.freeze = {"emb.*", "blocks.0.*"};
  const ParameterCount count = count_parameters(plan_.model, plan_.freeze);
  // Beside ln0, whose two vectors the first block has in addition, blocks are alike.
  const double block = (parameters_ - 2 * 64000 - 4 * 64) / 4 + 2 * 64;
  EXPECT_EQ(static_cast<double>(count.trained), parameters_ - 64000 - block);
  EXPECT_EQ(plan_memory(plan_)[MemoryKind::kMoments], static_cast<double>(count.trained) * 8);
  EXPECT_EQ(per_parameter(MemoryKind::kWeights), 2);
}

TEST_F(PlanMemory, RefusesPatternsThatFreezeNothingOrAll) {
  plan_.freeze = {"blocks.4.*"};
  EXPECT_THAT([&] { plan_memory(plan_); },
              ThrowsMessage<std::invalid_argument>(
                  HasSubstr("no tensor of the model matches \"blocks.4.*\"")));
  plan_.freeze = {"*"};
  EXPECT_THAT([&] { plan_memory(plan_); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("leaves no tensor to train")));
}

TEST_F(PlanMemory, KnowsEveryVersion) {
  plan_.device = PlanDevice::kCpu;
  for (const char* version : {"rwkv4", "rwkv5", "rwkv6", "rwkv7"}) {
    plan_.model = model_of(4, 64, 1000, 32, version);
    EXPECT_GT(plan_memory(plan_)[MemoryKind::kActivations], 0) << version;
  }
  plan_.model.version = "rwkv3";
  EXPECT_THAT([&] { plan_memory(plan_); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("model.version = \"rwkv3\"")));
}

// ---- Exchange -----------------------------------------------------------------------------------

TEST(PlanTime, HidesTheReductionInBackwardButNotTheGathering) {
  StepPlan plan{.model = model_of(24, 2048, 50277, 1024),
                .micro_batch_size = 8,
                .dtype = kBf16,
                .device = PlanDevice::kCuda,
                .processes = 8};
  const GpuRates& gpu = find_gpu_rates("h100");
  const auto bytes = 2 * static_cast<double>(count_parameters(plan.model, {}).all);
  EXPECT_EQ(plan_time(plan, gpu).exchange_ms, 0);
  plan.zero_stage = 1;
  EXPECT_DOUBLE_EQ(plan_time(plan, gpu).exchange_ms, 1000 * bytes * 7 / 8 / 332e9);
  // Backward of one sequence of 64 tokens is too short to hide anything of note.
  plan.zero_stage = 0;
  plan.micro_batch_size = 1;
  plan.model.ctx_len = 64;
  EXPECT_GT(plan_time(plan, gpu).exchange_ms, 0.5 * 2000 * bytes * 7 / 8 / 332e9);
}

TEST(PlanTime, CountsEveryMicroBatch) {
  StepPlan plan{.model = model_of(12, 768, 50277, 1024),
                .micro_batch_size = 16,
                .dtype = kBf16,
                .device = PlanDevice::kCuda};
  const double once = plan_time(plan, find_gpu_rates("h100")).step_ms();
  plan.micro_batches = 4;
  const double four = plan_time(plan, find_gpu_rates("h100")).step_ms();
  EXPECT_LT(four, 4 * once);  // one update
  EXPECT_GT(four, 3.7 * once);
}

TEST(PlanTime, KnowsNoRatesOfOtherGpus) {
  EXPECT_THAT([] { find_gpu_rates("b200"); },
              ThrowsMessage<std::invalid_argument>(
                  HasSubstr("--gpu b200: its rates are not known; known are h100, h200, a100")));
}

// ---- What would fit -----------------------------------------------------------------------------

class PlanRun : public testing::Test {
 protected:
  PlanRequest request_{
      .config = {}, .gpu = &find_gpu_rates("h100"), .processes = 8, .memory_bytes = 80e9};

  void SetUp() override {
    request_.config.model = model_of(24, 2048, 50277, 1024);
    request_.config.train.batch_size = 96;
    request_.config.train.dtype = kBf16;
  }
};

TEST_F(PlanRun, IsOfTheStageThatIsConfigured) {
  request_.memory_bytes = 38e9;
  EXPECT_EQ(plan_run(request_).configured.plan.zero_stage, 1);
  EXPECT_TRUE(plan_run(request_).fits);
  request_.config.distributed.zero = 0;
  EXPECT_EQ(plan_run(request_).configured.plan.zero_stage, 0);
  EXPECT_FALSE(plan_run(request_).fits);
  // One process has nothing to share.
  request_.processes = 1;
  EXPECT_EQ(plan_run(request_).configured.plan.zero_stage, 0);
}

TEST(MemoryAsLine, NamesEveryKindThatTakesMemoryAndWhatIsShared) {
  StepPlan plan{.model = model_of(4, 64, 1000, 32), .micro_batch_size = 2};
  const std::string alone = memory_as_line(plan);
  EXPECT_THAT(alone, StartsWith("memory, planned: weights "));
  EXPECT_THAT(alone, Not(HasSubstr("masters")));
  EXPECT_THAT(alone, Not(HasSubstr("part")));
  const double total = plan_memory(plan).total();
  EXPECT_THAT(alone, EndsWith(", " + format_bytes(std::llround(total)) + " in all"));
  plan.processes = 4;
  plan.zero_stage = 2;
  plan.dtype = kBf16;
  const std::string shared = memory_as_line(plan);
  EXPECT_THAT(shared,
              StartsWith("memory of each of 4 processes, planned for distributed.zero = 2: "));
  for (const char* part : {"masters [^,]*\\(1 of 4 parts\\)",
                           "moments [^,]*\\(1 of 4 parts\\)",
                           "gradients [^,]*\\(1 of 4 parts, and buckets\\)"}) {
    EXPECT_THAT(shared, ContainsRegex(part));
  }
}

TEST_F(PlanRun, OffersTheLargestMicroBatchThatFits) {
  request_.memory_bytes = 30e9;
  const RunPlan plan = plan_run(request_);
  ASSERT_FALSE(plan.fitting.empty());
  for (const PlanChoice& choice : plan.fitting) {
    EXPECT_LE(choice.memory.total(), 30e9);
    EXPECT_EQ(96 % choice.plan.micro_batch_size, 0);
    EXPECT_LE(choice.plan.micro_batch_size, 12);
    EXPECT_GE(choice.plan.micro_batch_size * choice.plan.micro_batches, 12);
    // The next divisor up would not fit, unless there are no more sequences.
    if (choice.plan.micro_batch_size == 12) {
      continue;
    }
    StepPlan larger = choice.plan;
    larger.micro_batch_size = larger.micro_batch_size == 8   ? 12
                              : larger.micro_batch_size == 6 ? 8
                              : larger.micro_batch_size == 4 ? 6
                                                             : larger.micro_batch_size + 1;
    larger.micro_batches = (12 + larger.micro_batch_size - 1) / larger.micro_batch_size;
    EXPECT_GT(plan_memory(larger).total(), 30e9);
  }
  ASSERT_TRUE(plan.best);
  for (const PlanChoice& choice : plan.fitting) {
    EXPECT_LE(choice.tokens_per_s, 1.01 * plan.fitting[*plan.best].tokens_per_s);
  }
}

TEST_F(PlanRun, SaysThatNothingFits) {
  request_.memory_bytes = 5e9;
  const RunPlan plan = plan_run(request_);
  EXPECT_FALSE(plan.fits);
  EXPECT_FALSE(plan.best);
  EXPECT_THAT(plan_as_text(request_, plan), HasSubstr("nothing fits"));
}

TEST_F(PlanRun, RefusesABatchOfFewerSequencesThanGpus) {
  request_.config.train.batch_size = 4;
  EXPECT_THAT([&] { plan_run(request_); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("train.batch_size = 4 for --gpus 8")));
}

TEST_F(PlanRun, DividesABatchUnevenly) {
  request_.config.train.batch_size = 15;
  const RunPlan plan = plan_run(request_);
  EXPECT_EQ(plan.configured.plan.micro_batch_size, 2);
  EXPECT_DOUBLE_EQ(plan.configured.tokens_per_s, 15 * 1024 / plan.configured.time.step_ms() * 1000);
}

}  // namespace
}  // namespace rwkv
