// A step that several processes make, against the one that a process makes alone.
#include <optional>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "tests/support/ranks.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "train/distributed/data_parallel.h"
#include "train/run_setup.h"
#include "train/step_runner.h"

namespace rwkv {
namespace {

struct Case {
  int64_t processes;
  int64_t zero_stage;
  at::ScalarType dtype;
  OptimizerMemory memory = {};
};

class Training {
 public:
  // Of rows [begin, end) of each step's three, one at a time.
  Training(const Case& of, int64_t begin, int64_t end, Communicator* all)
      : golden_(test::load_tensors(test::golden("rwkv4_ten_steps.safetensors"))),
        model_(open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat)),
        begin_(begin),
        end_(end) {
    freeze_parameters(model_, {"blocks.0.ffn.*"});
    Sharding sharding;
    if (all != nullptr) {
      // Small buckets: a parameter lies in several, and several parameters in one.
      sharding = {.rank = all->rank(),
                  .num_processes = all->world_size(),
                  .zero_stage = of.zero_stage,
                  .bucket_bytes = 6000};
    }
    optimizer_.emplace(model_, OptimizerConfig{.clip_norm = 0.1}, of.dtype, of.memory, sharding);
    runner_.emplace(model_,
                    *optimizer_,
                    nullptr,
                    StepSettings{.micro_batches = end - begin,
                                 .most_micro_batches = (3 + of.processes - 1) / of.processes,
                                 .step_rows = 3},
                    all);
  }

  StepNumbers step(int64_t number) {
    runner_->begin_step();
    for (int64_t row = begin_; row < end_; ++row) {
      runner_->add_micro_batch(golden_["inputs"][number].slice(0, row, row + 1),
                               golden_["targets"][number].slice(0, row, row + 1));
    }
    return runner_->finish_step(3e-3).wait();
  }

  const Optimizer& optimizer() const { return *optimizer_; }
  CheckpointPieces state() const {
    CheckpointPieces state;
    optimizer_->copy_state(state);
    return state;
  }
  NamedTensors weights() const {
    NamedTensors weights;
    for (const auto& item : model_->named_parameters()) {
      weights.emplace_back(item.key(), item.value().detach().to(at::kFloat));
    }
    return weights;
  }

 private:
  std::map<std::string, at::Tensor> golden_;
  RwkvModel model_;
  int64_t begin_, end_;
  std::optional<Optimizer> optimizer_;
  std::optional<StepRunner> runner_;
};

// Near in the sense of the whole tensor: where a gradient nearly vanishes, AdamW makes a movement
// of its rounding.
void expect_near(const at::Tensor& found, const at::Tensor& expected, const std::string& name) {
  EXPECT_LE((found - expected).norm().item<double>(), 1e-4 * expected.norm().item<double>() + 1e-9)
      << name;
}

void compare_pieces(const std::vector<TensorPiece>& found,
                    const std::vector<TensorPiece>& whole,
                    Communicator& all) {
  int64_t elements = 0, expected_elements = 0;
  for (const TensorPiece& tensor : whole) {
    expected_elements += tensor.end;
  }
  for (const TensorPiece& piece : found) {
    elements += piece.end - piece.begin;
    const auto tensor = std::ranges::find(whole, piece.name, &TensorPiece::name);
    ASSERT_NE(tensor, whole.end()) << piece.name;
    expect_near(piece.values, tensor->values.slice(0, piece.begin, piece.end), piece.name);
  }
  int64_t of_all = 0;
  for (const int64_t own : all.values_of_all(elements, "a test")) {
    of_all += own;
  }
  EXPECT_EQ(of_all, expected_elements);
}

void expect_cut(const Optimizer& optimizer, const Case& of) {
  const Optimizer::Bytes whole = Training(of, 0, 3, nullptr).optimizer().bytes();
  const Optimizer::Bytes own = optimizer.bytes();
  const auto expect_part = [&](int64_t part, int64_t all, bool is_cut) {
    // Padding between parameters, and to equal parts, is some hundred elements.
    EXPECT_NEAR(
        static_cast<double>(part), static_cast<double>(is_cut ? all / of.processes : all), 4000);
  };
  expect_part(own.weights, whole.weights, false);
  expect_part(own.masters, whole.masters, of.zero_stage >= 1);
  expect_part(own.moments, whole.moments, of.zero_stage >= 1);
  expect_part(own.gradients, whole.gradients, of.zero_stage >= 2);
}

void check(const Case& of) {
  test::on_ranks(of.processes, [&](Communicator& all) {
    Training alone(of, 0, 3, nullptr);
    Training together(of, all.rank() * 3 / of.processes, (all.rank() + 1) * 3 / of.processes, &all);
    for (int64_t step = 0; step < 4; ++step) {
      const StepNumbers expected = alone.step(step);
      const StepNumbers found = together.step(step);
      EXPECT_NEAR(found.loss, expected.loss, 1e-5) << "step " << step;
      EXPECT_NEAR(found.gradient_norm, expected.gradient_norm, 1e-5 * expected.gradient_norm)
          << "step " << step;
    }
    const NamedTensors weights = together.weights();
    const NamedTensors expected = alone.weights();
    for (size_t i = 0; i < weights.size(); ++i) {
      expect_near(weights[i].second, expected[i].second, weights[i].first);
    }
    const CheckpointPieces state = together.state();
    const CheckpointPieces whole = alone.state();
    compare_pieces(state.weights, whole.weights, all);
    compare_pieces(state.moments, whole.moments, all);
    expect_cut(together.optimizer(), of);
  });
}

TEST(DataParallel, MakesTheStepOfOneProcessAtEveryStage) {
  for (const int64_t processes : {2, 3}) {
    for (const int64_t stage : {0, 1, 2}) {
      SCOPED_TRACE(testing::Message() << processes << " processes, stage " << stage);
      check({.processes = processes, .zero_stage = stage, .dtype = at::kFloat});
    }
  }
}

TEST(DataParallel, CutsTheMastersOfABf16Model) {
  for (const int64_t stage : {1, 2}) {
    for (const bool split : {false, true}) {
      SCOPED_TRACE(testing::Message() << "stage " << stage << (split ? ", split" : ""));
      check({.processes = 2,
             .zero_stage = stage,
             .dtype = at::kBFloat16,
             .memory = {.split_masters = split}});
    }
  }
}

}  // namespace
}  // namespace rwkv
