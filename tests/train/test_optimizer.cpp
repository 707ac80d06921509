#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/atomic_file.h"
#include "model/ops/adamw.h"
#include "model/version_shapes.h"
#include "tests/support/optimizer_state.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "train/lr_schedule.h"
#include "train/optimizer.h"

namespace rwkv {
namespace {

class TenSteps : public testing::TestWithParam<std::string> {};

// Ten steps of the same model on the same batches, in plain maths and float64.
TEST_P(TenSteps, MatchFloat64) {
  const std::string weights = test::golden(GetParam() + "_odd.safetensors");
  auto golden = test::load_tensors(test::golden(GetParam() + "_ten_steps.safetensors"));
  const auto json =
      nlohmann::json::parse(read_text_file(test::golden(GetParam() + "_ten_steps.json")));
  const auto& settings = json.at("settings");
  const LrSchedule schedule{.kind = ScheduleKind::kExponential,
                            .lr_init = settings.at("lr_init"),
                            .lr_final = settings.at("lr_final"),
                            .warmup_tokens = settings.at("warmup_tokens")};
  const OptimizerConfig config{.beta1 = settings.at("beta1"),
                               .beta2 = settings.at("beta2"),
                               .eps = settings.at("eps"),
                               .weight_decay = settings.at("weight_decay"),
                               .clip_norm = settings.at("clip")};
  RwkvModel model = open_model(weights, at::kFloat);
  Optimizer optimizer(model, config, at::kFloat);
  const int64_t tokens_per_step = golden["inputs"][0].numel();
  for (int64_t step = 0; step < 10; ++step) {
    const auto& expected = json.at("steps")[static_cast<size_t>(step)];
    const double lr = schedule.lr(step * tokens_per_step, 10 * tokens_per_step);
    EXPECT_NEAR(lr, expected.at("lr"), 1e-12) << "step " << step;
    optimizer.zero_gradient();
    // The batch of three in parts of two and one: accumulation must not show.
    double loss_sum = 0;
    for (const auto& [begin, end] : {std::pair{0, 2}, std::pair{2, 3}}) {
      const at::Tensor inputs_BT = golden["inputs"][step].slice(0, begin, end);
      const at::Tensor targets_BT = golden["targets"][step].slice(0, begin, end);
      const State empty = model->initial_state(end - begin);
      const at::Tensor loss = model->loss(inputs_BT, targets_BT, empty, settings.at("l2wrap")).loss;
      const double share = (end - begin) / 3.0;
      (loss * share).backward();
      optimizer.accumulate_gradient();
      loss_sum += loss.item<double>() * share;
    }
    EXPECT_NEAR(loss_sum, expected.at("loss"), 1e-5) << "step " << step;
    const double norm = optimizer.gradient_norm();
    EXPECT_NEAR(norm, expected.at("grad_norm"), 1e-5 * norm) << "step " << step;
    optimizer.set_lr(lr);
    optimizer.update(at::scalar_tensor(loss_sum));
    EXPECT_EQ(optimizer.numbers().gradient_norm, norm) << "step " << step;
    EXPECT_FALSE(optimizer.numbers().skipped) << "step " << step;
  }
  const auto start = test::load_tensors(weights);
  const std::vector<std::string> unused = find_version_shapes(GetParam()).unused;
  for (const auto& [name, weight] : test::master_weights(optimizer)) {
    if (matches_any(unused, name)) {
      EXPECT_EQ(weight.abs().max().item<float>(), 0) << name;
      continue;
    }
    const at::Tensor moved = weight - start.at(name);
    const at::Tensor expected = golden["final." + name] - start.at(name);
    at::Tensor error = (moved - expected).abs().flatten();
    // Where a gradient nearly vanishes, AdamW makes a movement of its rounding: one number of a
    // tensor may be off by 5 % of the longest way, the others together by 1e-4.
    at::Tensor worst = error[error.argmax()];
    EXPECT_LE(worst.item<double>(), 0.05 * expected.abs().max().item<double>()) << name;
    worst.zero_();
    EXPECT_LE(error.norm().item<double>(), 1e-4 * expected.norm().item<double>()) << name;
    EXPECT_TRUE(test::same_bits(model->named_parameters()[name], weight)) << name;
  }
}

INSTANTIATE_TEST_SUITE_P(Golden,
                         TenSteps,
                         testing::Values("rwkv4", "rwkv7"),
                         [](const auto& named) { return named.param; });

// Two hundred updates of one parameter by a gradient of ones, each far below bf16's resolution.
void update_by_ones(Optimizer& optimizer, at::Tensor& parameter) {
  optimizer.set_lr(1e-4);
  for (int i = 0; i < 200; ++i) {
    optimizer.zero_gradient();
    parameter.mutable_grad() = at::ones_like(parameter);
    optimizer.accumulate_gradient();
    optimizer.update(at::zeros({}));
  }
}

TEST(Optimizer, KeepsFp32MastersOfABf16Model) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  const at::Tensor before = model->named_parameters()["head.weight"].detach().clone();
  Optimizer optimizer(model, {.clip_norm = 0}, at::kBFloat16);
  EXPECT_TRUE(test::same_bits(test::master_weights(optimizer).back().second, before));
  at::Tensor parameter = model->named_parameters()["head.weight"];
  EXPECT_EQ(parameter.scalar_type(), at::kBFloat16);
  // The steps add up in the master and then show in the weight. (200 of them, each rounded to fp32
  // at 2, may be off by 2.4e-5.)
  update_by_ones(optimizer, parameter);
  EXPECT_TRUE(test::close_max(test::master_weights(optimizer).back().second, before - 0.02, 5e-5));
  EXPECT_TRUE(
      test::same_bits(parameter, test::master_weights(optimizer).back().second.to(at::kBFloat16)));
}

TEST(Optimizer, SplitMastersAndABf16GradientComeToTheSame) {
  std::vector<at::Tensor> masters;
  for (const OptimizerMemory& memory :
       {OptimizerMemory{}, OptimizerMemory{.split_masters = true, .bf16_gradient = true}}) {
    RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
    const NamedTensors before = test::master_weights(Optimizer(model, {}, at::kFloat));
    Optimizer optimizer(model, {.clip_norm = 0}, at::kBFloat16, memory);
    const NamedTensors split = test::master_weights(optimizer);
    for (size_t i = 0; i < split.size(); ++i) {
      EXPECT_TRUE(test::same_bits(split[i].second, before[i].second)) << split[i].first;
    }
    at::Tensor parameter = model->named_parameters()["head.weight"];
    update_by_ones(optimizer, parameter);
    masters.push_back(test::master_weights(optimizer).back().second);
    EXPECT_TRUE(test::close_max(parameter, masters.back(), 1.0 / 128));
  }
  EXPECT_TRUE(test::same_bits(masters[1], masters[0]));
}

TEST(Optimizer, MakesNoUpdateAfterALossOrGradientThatIsNotFinite) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const auto& [loss, gradient] : {std::pair{kInf, 1.0F}, std::pair{1.0F, kInf}}) {
    RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
    Optimizer optimizer(model, {}, at::kFloat);
    at::Tensor parameter = model->named_parameters()["head.weight"];
    const at::Tensor before = parameter.detach().clone();
    optimizer.set_lr(1e-2);
    const auto update = [&](float with_loss, float with_gradient) {
      optimizer.zero_gradient();
      parameter.mutable_grad() = at::full_like(parameter, with_gradient);
      optimizer.accumulate_gradient();
      optimizer.update(at::scalar_tensor(with_loss));
    };
    update(loss, gradient);
    EXPECT_TRUE(optimizer.numbers().skipped);
    // What comes after it may be of a step that should not have been made.
    update(1, 1);
    EXPECT_TRUE(optimizer.numbers().skipped);
    EXPECT_TRUE(test::same_bits(parameter, before));
    CheckpointPieces state;
    optimizer.copy_state(state);
    EXPECT_EQ(state.moments.front().values.abs().max().item<float>(), 0);
  }
}

TEST(Optimizer, SkipsOutliers) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  RwkvModel other = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  Optimizer optimizer(model, {}, at::kFloat), without(other, {}, at::kFloat);
  const auto update = [](RwkvModel of, Optimizer& with, float loss, float gradient) {
    at::Tensor parameter = of->named_parameters()["head.weight"];
    with.zero_gradient();
    parameter.mutable_grad() = at::full_like(parameter, gradient);
    with.accumulate_gradient();
    with.update(at::scalar_tensor(loss));
    return with.numbers();
  };
  optimizer.set_lr(1e-2);
  without.set_lr(1e-2);
  const double norm = update(model, optimizer, 1, 2).gradient_norm;
  update(other, without, 1, 2);
  // At the limits, above the loss's, above the norm's, below both.
  optimizer.set_limits(3, norm);
  EXPECT_FALSE(update(model, optimizer, 3, 2).outlier);
  EXPECT_TRUE(update(model, optimizer, 3.5, 1).outlier);
  EXPECT_TRUE(update(model, optimizer, 1, 4).outlier);
  EXPECT_FALSE(optimizer.numbers().skipped);
  EXPECT_FALSE(update(model, optimizer, 1, 1).outlier);
  // To weights, moments and the count of updates it is as if they had not been.
  update(other, without, 3, 2);
  update(other, without, 1, 1);
  EXPECT_EQ(optimizer.control()[ops::kControlSteps].item<double>(), 3);
  CheckpointPieces state, expected;
  optimizer.copy_state(state);
  without.copy_state(expected);
  for (size_t i = 0; i < state.weights.size(); ++i) {
    EXPECT_TRUE(test::same_bits(state.weights[i].values, expected.weights[i].values));
  }
  for (size_t i = 0; i < state.moments.size(); ++i) {
    EXPECT_TRUE(test::same_bits(state.moments[i].values, expected.moments[i].values));
  }
}

TEST(SplitMaster, HoldsEveryFp32NumberAndRoundsToNearest) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{3});
  // Random bits: numbers of every size, those too small to be normal among them.
  at::Tensor bits = at::randint(std::numeric_limits<int32_t>::min(),
                                std::numeric_limits<int32_t>::max(),
                                {100'003},
                                generator,
                                at::kLong);
  at::Tensor master = bits.to(at::kInt).view(at::kFloat);
  master = at::where(master.isfinite() & (master.abs() < 3e38), master, at::zeros_like(master));
  at::Tensor weights = at::empty_like(master, at::kBFloat16);
  at::Tensor low = at::empty_like(master, at::kShort);
  ops::split_master(master, weights, low);
  EXPECT_TRUE(test::same_bits(ops::join_master(weights, low), master));
  // Only where two bf16 numbers are equally near may rounding differ from LibTorch's.
  const at::Tensor is_tie = (bits & 0xffff) == 0x8000;
  const at::Tensor differs = weights.view(at::kShort) != master.to(at::kBFloat16).view(at::kShort);
  EXPECT_FALSE((differs & ~is_tie).any().item<bool>());
}

// Norm of what backward of `loss` adds to the accumulated gradient.
double norm_after(Optimizer& optimizer, const at::Tensor& loss) {
  loss.backward();
  optimizer.accumulate_gradient();
  return optimizer.gradient_norm();
}

TEST(Optimizer, TakesGradientsOutOfTheModelAndStartsANewSumWhenAsked) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  Optimizer optimizer(model, {}, at::kFloat);
  const at::Tensor head = model->named_parameters()["head.weight"];
  const at::Tensor bias = model->named_parameters()["ln_out.bias"];
  const double head_norm = norm_after(optimizer, head.sum());
  EXPECT_NEAR(head_norm, std::sqrt(head.numel()), 1e-3);
  EXPECT_FALSE(head.grad().defined());
  EXPECT_NEAR(norm_after(optimizer, head.sum()), 2 * head_norm, 1e-3);
  // What no backward reaches after zero_gradient() counts as zero.
  optimizer.zero_gradient();
  EXPECT_NEAR(norm_after(optimizer, bias.sum()), std::sqrt(bias.numel()), 1e-5);
}

TEST(Optimizer, LeavesGradientsToTheModelOnceItIsGone) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  std::optional<Optimizer> optimizer;
  optimizer.emplace(model, OptimizerConfig{}, at::kFloat);
  optimizer.reset();
  const at::Tensor head = model->named_parameters()["head.weight"];
  head.sum().backward();
  EXPECT_TRUE(test::same_bits(head.grad(), at::ones_like(head)));
}

TEST(Optimizer, NamesTheFirstGradientThatIsNotFinite) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  Optimizer optimizer(model, {}, at::kFloat);
  EXPECT_EQ(optimizer.first_nonfinite_gradient(), "");
  at::Tensor parameter = model->named_parameters()["blocks.1.ffn.key.weight"];
  parameter.mutable_grad() = at::full_like(parameter, std::numeric_limits<float>::infinity());
  optimizer.accumulate_gradient();
  EXPECT_EQ(optimizer.first_nonfinite_gradient(), "blocks.1.ffn.key.weight");
}

TEST(SumOfSquares, IsExactAndTheSameOnAnyNumberOfThreads) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{2});
  const at::Tensor x = at::randn({300'007}, generator, at::kFloat);
  const double expected = x.to(at::kDouble).square().sum().item<double>();
  const int threads = at::get_num_threads();
  const auto sum_of_squares = [](const at::Tensor& tensor) {
    at::Tensor sum = at::zeros({}, at::kDouble);
    ops::add_sum_of_squares(tensor, sum);
    return sum.item<double>();
  };
  const double first = sum_of_squares(x);
  at::set_num_threads(1);
  const double second = sum_of_squares(x);
  at::set_num_threads(threads);
  EXPECT_NEAR(first, expected, 1e-9 * expected);
  EXPECT_EQ(first, second);
  const at::Tensor half = x.to(at::kBFloat16);
  const double of_half = half.to(at::kDouble).square().sum().item<double>();
  EXPECT_NEAR(sum_of_squares(half), of_half, 1e-9 * of_half);
}

}  // namespace
}  // namespace rwkv
