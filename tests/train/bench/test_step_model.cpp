#include <algorithm>
#include <functional>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/rwkv_model.h"
#include "model/version_shapes.h"
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
StepShape with_version(StepShape shape, const std::string& version) {
  shape.model.version = version;
  find_version_shapes(version).resolve(shape.model);
  return shape;
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

// 6 FLOPs a token for each weight of a matrix but the embedding, and for those of the recurrence.
TEST(StepModel, CountsTheFlopsOfRwkv7) {
  const StepShape shape = with_version(l12(), "rwkv7");
  const auto costs = step_model(shape, TrainDtype::kBf16, 1);
  double weights = 0;
  for (const auto& [name, tensor] : find_version_shapes("rwkv7").parameters(shape.model)) {
    const bool is_vector = name.ends_with("r_k") || name == "emb.weight";
    const bool is_unused = name == "blocks.0.att.v1" || name == "blocks.0.att.v2";
    if (tensor.size() == 2 && !is_vector && !is_unused) {
      weights += static_cast<double>(num_elements(tensor));
    }
  }
  const double wkv7 = cost_of(costs, StepOp::kWkv7).flops;
  EXPECT_DOUBLE_EQ(total_flops(costs) - wkv7, 6 * 16384 * weights);
  // Multiply-adds, of a state [64, 64] for each head: 5 forward, 13 backward.
  EXPECT_EQ(wkv7, 12.0 * 16384 * 12 * 64 * 64 * 2 * 18);
}

TEST(StepModel, CountsBytesOfEachElementOfALayerOfRwkv7) {
  StepShape shape = with_version(l12(), "rwkv7");
  const auto costs = step_model(shape, TrainDtype::kBf16, 64);
  const double elements = 12.0 * 16384 * 768;
  const auto bytes_per_element = [&](StepOp op) { return cost_of(costs, op).bytes / elements; };
  // Six mixes and one.
  EXPECT_EQ(bytes_per_element(StepOp::kLayerNormShiftMix), 2 * (11 + 13) + 32.0 / 768);
  // Seven, and six gradients for seven; u and a state for every 64 tokens, in fp32, both ways.
  EXPECT_EQ(bytes_per_element(StepOp::kWkv7), 2 * (7 + 13) + 4 * 2 * 2);
  EXPECT_EQ(bytes_per_element(StepOp::kWkv7Output), 2 * (6 + 11));
  // Of the first layer 11 less, for it has no gate of values.
  EXPECT_DOUBLE_EQ(bytes_per_element(StepOp::kWkv7Inputs), 2 * (23 - 11.0 / 12));
  EXPECT_DOUBLE_EQ(bytes_per_element(StepOp::kSums), 2 * (15 - 3.0 / 12));
  // What walks the tokens has them one after another in each layer, with all states side by side.
  EXPECT_EQ(cost_of(costs, StepOp::kWkv7).walked_tokens, 12 * 1024);
  EXPECT_EQ(cost_of(costs, StepOp::kWkv7).walked_numbers, 16 * 12 * 64 * 64);
}

TEST(StepModel, SaysWhatRecomputingDoesAgain) {
  const auto rwkv4 = step_model(l12(), TrainDtype::kBf16, 64);
  const auto rwkv7 = step_model(with_version(l12(), "rwkv7"), TrainDtype::kBf16, 64);
  // Of 20 and of 24 passes over an activation 7 and 9 leave the mixes.
  EXPECT_EQ(cost_of(rwkv4, StepOp::kLayerNormShiftMix).mixes_again, 7.0 / 20);
  EXPECT_EQ(cost_of(rwkv7, StepOp::kLayerNormShiftMix).mixes_again, 9.0 / 24);
  for (const auto& costs : {rwkv4, rwkv7}) {
    for (const StepOpCost& cost : costs) {
      // Embedding, last norm, head and update are of no block.
      const bool is_of_block = cost.op > StepOp::kLayerNorm && cost.op < StepOp::kHeadProducts;
      EXPECT_EQ(cost.blocks_again > 0, is_of_block) << name_of(cost.op);
      EXPECT_LT(cost.blocks_again, 0.5) << name_of(cost.op);
      EXPECT_EQ(cost.mixes_again > 0, cost.op == StepOp::kLayerNormShiftMix) << name_of(cost.op);
    }
  }
}

TEST(StepModel, HasARowForEachKindOnceInTheirOrder) {
  for (const char* version : {"rwkv4", "rwkv7"}) {
    const auto costs = step_model(with_version(l24(), version), TrainDtype::kFp32, 1);
    for (size_t i = 0; i < costs.size(); ++i) {
      EXPECT_GT(costs[i].bytes, 0) << name_of(costs[i].op);
      EXPECT_TRUE(i == 0 || costs[i].op > costs[i - 1].op) << name_of(costs[i].op);
    }
  }
}

TEST(StepModel, RefusesAVersionWhoseOpsItDoesNotKnow) {
  const StepShape shape = with_version(l12(), "rwkv6");
  EXPECT_FALSE(has_step_model(shape.model));
  EXPECT_THAT([&] { step_model(shape, TrainDtype::kFp32, 1); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("model.version is rwkv6")));
}

TEST(FloorMs, IsTheLongerOfArithmeticAndBytes) {
  const StepOpCost cost{.op = StepOp::kOther, .calls = 1, .flops = 6e9, .bytes = 4e9};
  EXPECT_DOUBLE_EQ(floor_ms(cost, {.flops_per_s = 2e9, .bytes_per_s = 4e9}), 3000);
  EXPECT_DOUBLE_EQ(floor_ms(cost, {.flops_per_s = 6e9, .bytes_per_s = 2e9}), 2000);
}

class TimeOpsOfStep : public ::testing::TestWithParam<const char*> {
 protected:
  StepShape shape_ = with_version({.model = model_of(2, 128, 96, 32), .batch_size = 4}, GetParam());
  RwkvModel model_{shape_.model};
  at::Tensor tokens_BT_ = at::randint(96, {4, 32}, at::kLong);

  void SetUp() override { model_->initialise(1, 1e-4); }
};
INSTANTIATE_TEST_SUITE_P(Versions, TimeOpsOfStep, ::testing::Values("rwkv4", "rwkv7"));

TEST_P(TimeOpsOfStep, FindsEachKind) {
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
  for (const double ms : times.ms) {
    sum += ms;
  }
  EXPECT_LT(sum, times.total_ms);
  EXPECT_GT(times[StepOp::kOther], 0);
  std::vector<StepOp> known;
  for (const StepOpCost& cost : step_model(shape_, TrainDtype::kFp32, 1)) {
    EXPECT_GT(times[cost.op], 0) << name_of(cost.op);
    known.push_back(cost.op);
  }
  // Nothing is timed as an op that another version has, but for a sum or two that all have.
  for (const StepOp op : {StepOp::kLowRankProducts,
                          StepOp::kWkv4,
                          StepOp::kWkv7Inputs,
                          StepOp::kWkv7,
                          StepOp::kWkv7Output,
                          StepOp::kGatedResidual}) {
    if (std::ranges::find(known, op) == known.end()) {
      EXPECT_EQ(times[op], 0) << name_of(op);
    }
  }
}

// Neither name nor weight tells the product behind a matrix's gradient: only the forward op does.
// Where that was not seen, the time is in no row.
TEST_P(TimeOpsOfStep, GivesBackwardToTheKindOfItsForwardOp) {
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
  const StepShape shape{.model = model_of(2, 32, 64, 16), .batch_size = 2};
  const BenchRow row = bench_step(shape, at::kFloat, {.repeats = 2}, StepDetail::kByOp);
  const size_t kinds = step_model(shape, TrainDtype::kFp32, 1).size();
  ASSERT_EQ(row.parts.size(), kinds + 2);
  EXPECT_EQ(row.parts.front().what, "embedding");
  EXPECT_EQ(row.parts[kinds].what, "other ops");
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
