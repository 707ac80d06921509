#include <algorithm>
#include <functional>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/rwkv_model.h"
#include "train/bench/bench_model.h"
#include "train/bench/op_times.h"
#include "train/bench/step_model.h"
#include "train/optimizer.h"

namespace rwkv {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

ModelConfig model_of(int64_t n_layer, int64_t n_embd, int64_t vocab_size, int64_t ctx_len) {
  return {.n_layer = n_layer,
          .n_embd = n_embd,
          .dim_att = n_embd,
          .dim_ffn = 4 * n_embd,
          .vocab_size = vocab_size,
          .ctx_len = ctx_len};
}

StepShape l12() {
  return {.model = model_of(12, 768, 50277, 1024), .batch_size = 16};
}
StepShape l24() {
  return {.model = model_of(24, 2048, 50277, 1024), .batch_size = 8};
}

StepOpCost cost_of(const std::vector<StepOpCost>& costs, StepOp op) {
  return *std::find_if(
      costs.begin(), costs.end(), [&](const StepOpCost& cost) { return cost.op == op; });
}

double total_flops(const std::vector<StepOpCost>& costs) {
  double flops = 0;
  for (const StepOpCost& cost : costs) {
    flops += cost.flops;
  }
  return flops;
}

// 6 FLOPs a token for each of 13 C^2 weights a layer and of the padded head.
TEST(StepModel, CountsTheFlopsOfTheMatrixProducts) {
  EXPECT_NEAR(total_flops(step_model(l12(), TrainDtype::kBf16, 64)) / 1e12, 12.84, 0.005);
  EXPECT_NEAR(total_flops(step_model(l24(), TrainDtype::kBf16, 64)) / 1e12, 69.4, 0.05);
  const auto head = cost_of(step_model(l12(), TrainDtype::kBf16, 64), StepOp::kHeadProducts);
  EXPECT_EQ(head.flops, 6.0 * 16384 * 50304 * 768);
  EXPECT_EQ(head.calls, 3);
  const auto unpadded = cost_of(step_model(l12(), TrainDtype::kBf16, 1), StepOp::kHeadProducts);
  EXPECT_EQ(unpadded.flops, 6.0 * 16384 * 50277 * 768);
}

TEST(StepModel, CountsBytesOfEachElementOfALayer) {
  const auto costs = step_model(l12(), TrainDtype::kBf16, 64);
  const double elements = 12.0 * 16384 * 768;
  const auto bytes_per_element = [&](StepOp op) { return cost_of(costs, op).bytes / elements; };
  // r, k, v, y; r, k, v, dy, dr, dk, dv.
  EXPECT_EQ(bytes_per_element(StepOp::kWkv4), 8 + 14);
  EXPECT_EQ(bytes_per_element(StepOp::kGatedResidual), 8 + 10);
  // Four times as wide.
  EXPECT_EQ(bytes_per_element(StepOp::kReluSquared), 16 + 24);
  // ln1: 8 forward and 12 backward; ln2: 10 and 10; and mean and rstd of a token, fp32, written and
  // read for each of the two.
  EXPECT_EQ(bytes_per_element(StepOp::kLayerNormShiftMix), 8 + 12 + 10 + 10 + 32.0 / 768);
}

TEST(StepModel, CountsBytesOfEachLogit) {
  EXPECT_EQ(cost_of(step_model(l12(), TrainDtype::kBf16, 64), StepOp::kCrossEntropy).bytes,
            4.0 * 16384 * 50304);
}

TEST(StepModel, CountsBytesOfEachParameter) {
  // Wider than its neighbours, so that no size stands in for another.
  StepShape shape{.model = model_of(3, 32, 77, 8), .batch_size = 2};
  shape.model.dim_att = 48;
  shape.model.dim_ffn = 80;
  RwkvModel model(shape.model);
  const auto parameters = static_cast<double>(model->num_parameters());
  const auto bytes_per_parameter = [&](TrainDtype dtype, StepOp op) {
    return cost_of(step_model(shape, dtype, 1), op).bytes / parameters;
  };
  EXPECT_EQ(bytes_per_parameter(TrainDtype::kFp32, StepOp::kAdamw), 28);
  EXPECT_EQ(bytes_per_parameter(TrainDtype::kBf16, StepOp::kAdamw), 30);
  EXPECT_EQ(bytes_per_parameter(TrainDtype::kBf16, StepOp::kGlobalNorm), 4);
  EXPECT_EQ(bytes_per_parameter(TrainDtype::kFp32, StepOp::kGradientSum), 8);
  EXPECT_EQ(bytes_per_parameter(TrainDtype::kBf16, StepOp::kGradientSum), 6);
  EXPECT_EQ(cost_of(step_model(shape, TrainDtype::kFp32, 1), StepOp::kGradientSum).calls,
            static_cast<int64_t>(model->parameters().size()));
}

TEST(StepModel, CountsProductsOfUnequalSizes) {
  StepShape shape{.model = model_of(3, 32, 77, 8), .batch_size = 2};
  shape.model.dim_att = 48;
  shape.model.dim_ffn = 80;
  const auto costs = step_model(shape, TrainDtype::kFp32, 1);
  const auto flops_per_token = [&](StepOp op) { return cost_of(costs, op).flops / 16 / 3; };
  EXPECT_EQ(flops_per_token(StepOp::kRkvProducts), 6 * 3 * 32 * 48);
  EXPECT_EQ(flops_per_token(StepOp::kOutputProduct), 6 * 48 * 32);
  EXPECT_EQ(flops_per_token(StepOp::kFfnProducts), 6 * (2 * 32 * 80 + 32 * 32));
  // Three products of three layers, each with x [16, 48], y [16, 32] and W [32, 48].
  EXPECT_EQ(cost_of(costs, StepOp::kOutputProduct).bytes,
            4.0 * 3 * 3 * (16 * 48 + 16 * 32 + 32 * 48));
}

TEST(StepModel, HasARowForEachKindInTheirOrder) {
  const auto costs = step_model(l24(), TrainDtype::kFp32, 1);
  ASSERT_EQ(costs.size(), kNumStepOps - 1);
  for (size_t i = 0; i < costs.size(); ++i) {
    EXPECT_EQ(costs[i].op, static_cast<StepOp>(i));
    EXPECT_GT(costs[i].bytes, 0) << name_of(costs[i].op);
  }
}

TEST(StepModel, RefusesAnotherVersion) {
  StepShape shape = l12();
  shape.model.version = "rwkv7";
  EXPECT_THAT(
      [&] { step_model(shape, TrainDtype::kFp32, 1); },
      ThrowsMessage<std::invalid_argument>(HasSubstr("model.version is rwkv7, expected rwkv4")));
}

TEST(FloorMs, IsTheLongerOfArithmeticAndBytes) {
  const StepOpCost cost{.op = StepOp::kOther, .calls = 1, .flops = 6e9, .bytes = 4e9};
  EXPECT_DOUBLE_EQ(floor_ms(cost, {.flops_per_s = 2e9, .bytes_per_s = 4e9}), 3000);
  EXPECT_DOUBLE_EQ(floor_ms(cost, {.flops_per_s = 6e9, .bytes_per_s = 2e9}), 2000);
}

class TimeOpsOfStep : public ::testing::Test {
 protected:
  ModelConfig config_ = model_of(2, 128, 96, 32);
  RwkvModel model_{config_};
  at::Tensor tokens_BT_ = at::randint(96, {4, 32}, at::kLong);

  void SetUp() override { model_->initialise(1, 1e-4); }
};

TEST_F(TimeOpsOfStep, FindsEachKind) {
  Optimizer optimizer(model_, {}, at::kFloat);
  const StepOpTimes times = time_ops_of_step(model_, at::kCPU, [&] {
    optimizer.zero_gradient();
    const at::Tensor loss = model_->loss(tokens_BT_, tokens_BT_, model_->initial_state(4), 0).loss;
    loss.backward();
    optimizer.accumulate_gradient();
    optimizer.set_lr(1e-5);
    optimizer.update(loss.detach());
  });
  double sum = 0;
  for (size_t op = 0; op < kNumStepOps; ++op) {
    EXPECT_GT(times.ms[op], 0) << name_of(static_cast<StepOp>(op));
    sum += times.ms[op];
  }
  EXPECT_LT(sum, times.total_ms);
}

// Neither name nor weight tells the product behind a matrix's gradient: only the forward op does.
// Where that was not seen, the time is in no row.
TEST_F(TimeOpsOfStep, GivesBackwardToTheKindOfItsForwardOp) {
  const auto forward = [&] {
    return model_->loss(tokens_BT_, tokens_BT_, model_->initial_state(4), 0).loss;
  };
  const auto share_of_other = [&](const std::function<void()>& work) {
    const StepOpTimes times = time_ops_of_step(model_, at::kCPU, work);
    return times[StepOp::kOther] / times.total_ms;
  };
  // The least of a few: what disturbs the machine adds to either.
  double seen = 1;
  double unseen = 1;
  for (int i = 0; i < 5; ++i) {
    seen = std::min(seen, share_of_other([&] { forward().backward(); }));
    const at::Tensor loss = forward();
    unseen = std::min(unseen, share_of_other([&] { loss.backward(); }));
  }
  EXPECT_LT(seen, 0.5 * unseen);
}

TEST(BenchStep, ExplainsItsTimeByOp) {
  const BenchRow row = bench_step({.model = model_of(2, 32, 64, 16), .batch_size = 2},
                                  at::kFloat,
                                  {.repeats = 2},
                                  StepDetail::kByOp);
  ASSERT_EQ(row.parts.size(), kNumStepOps + 1);
  EXPECT_EQ(row.parts.front().what, "embedding");
  EXPECT_EQ(row.parts[kNumStepOps - 1].what, "other ops");
  const BenchRow& total = row.parts.back();
  EXPECT_EQ(total.what, "explained");
  std::vector<std::string> names;
  for (const auto& figure : total.figures) {
    names.push_back(figure.first);
  }
  EXPECT_THAT(names, ElementsAre("percent", "calls", "gflop", "mb", "floor_ms", "x_floor"));
  double floor = 0;
  for (size_t i = 0; i + 2 < row.parts.size(); ++i) {
    floor += row.parts[i].figures[4].second;
  }
  EXPECT_DOUBLE_EQ(total.figures[4].second, floor);
  EXPECT_THAT(format_rows({row}), HasSubstr("\n" + row.what + ":\n"));
}

TEST(BenchStep, HasNoPartsUnlessAsked) {
  EXPECT_TRUE(bench_step({.model = model_of(1, 16, 16, 8), .batch_size = 1},
                         at::kFloat,
                         {.repeats = 1},
                         StepDetail::kWhole)
                  .parts.empty());
}

}  // namespace
}  // namespace rwkv
