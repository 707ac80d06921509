// A step that is recorded and replayed, on a device of the test's own that is the CPU: what it
// records does nothing until it is replayed, as on a GPU.
#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/optimizer_state.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "train/device.h"
#include "train/step_runner.h"

namespace rwkv {
namespace {

class ReplayedCall final : public ops::RecordedWork {
 public:
  explicit ReplayedCall(std::function<void()> work) : work_(std::move(work)) {}
  void replay() override { work_(); }

 private:
  std::function<void()> work_;
};

class ClonedTensor final : public ops::HostCopy {
 public:
  explicit ClonedTensor(const at::Tensor& from) : copy_(from.clone()) {}
  at::Tensor wait() override { return copy_; }

 private:
  at::Tensor copy_;
};

class RecordingCpu final : public ops::DeviceRuntime {
 public:
  bool can_record = true;
  int64_t recorded = 0;

  at::Device device() const override { return at::kCPU; }
  std::string name() const override { return "a CPU that records"; }
  int64_t max_channels() const override { return 8; }
  ops::DeviceMemory memory() const override { return {}; }
  void reset_memory() override {}
  void synchronize() override {}
  std::unique_ptr<ops::RecordedWork> record(const std::function<void()>& work) override {
    TORCH_CHECK(can_record, "nothing can be recorded here");
    ++recorded;
    return std::make_unique<ReplayedCall>(work);
  }
  void upload(const at::Tensor& from_host, at::Tensor& to) override { to.copy_(from_host); }
  std::unique_ptr<ops::HostCopy> download(const at::Tensor& from) override {
    return std::make_unique<ClonedTensor>(from);
  }
  void make_collectives(const c10::intrusive_ptr<c10d::Store>&,
                        int,
                        int,
                        std::chrono::milliseconds,
                        c10::intrusive_ptr<c10d::Backend>&) override {}
  double milliseconds_of(const std::function<void()>& work) override {
    work();
    return 1;
  }
};

struct Outcome {
  std::vector<double> losses;
  NamedTensors weights;
};

// Five steps of two micro-batches each. The numbers of a step are read one step late.
Outcome train(ops::DeviceRuntime* runtime) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  Optimizer optimizer(model, {}, at::kFloat);
  StepRunner runner(model, optimizer, runtime, {.micro_batches = 2, .l2wrap = 1e-4});
  Outcome outcome;
  PendingNumbers before;
  for (int64_t step = 0; step < 5; ++step) {
    runner.begin_step();
    for (int64_t micro_batch = 0; micro_batch < 2; ++micro_batch) {
      const at::Tensor tokens_BT =
          (at::arange(24).view({2, 12}) * 5 + 3 * step + micro_batch).remainder(17);
      runner.add_micro_batch(tokens_BT.slice(1, 0, 11), tokens_BT.slice(1, 1, 12));
    }
    PendingNumbers numbers = runner.finish_step(1e-2 / (1 + static_cast<double>(step)));
    if (step > 0) {
      outcome.losses.push_back(before.wait().loss);
    }
    before = std::move(numbers);
  }
  outcome.losses.push_back(before.wait().loss);
  EXPECT_EQ(runner.losses().mean().item<float>(), static_cast<float>(outcome.losses.back()));
  for (const auto& [name, weight] : test::master_weights(optimizer)) {
    outcome.weights.emplace_back(name, weight.clone());
  }
  return outcome;
}

void expect_same(const Outcome& actual, const Outcome& expected) {
  EXPECT_EQ(actual.losses, expected.losses);
  for (size_t i = 0; i < expected.weights.size(); ++i) {
    EXPECT_TRUE(test::same_bits(actual.weights[i].second, expected.weights[i].second))
        << expected.weights[i].first;
  }
}

TEST(StepRunner, ReplaysWhatItRecordedBitForBit) {
  const Outcome eager = train(nullptr);
  EXPECT_LT(eager.losses.back(), eager.losses.front());
  RecordingCpu device;
  expect_same(train(&device), eager);
  // First micro-batch, later ones, update.
  EXPECT_EQ(device.recorded, 3);
}

TEST(Device, RefusesAModelWiderThanItsOps) {
  RecordingCpu device;
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                          move_to_device(model, {.device = at::kCPU, .runtime = &device})),
              testing::HasSubstr("n_embd = 40: the kernels of cpu take at most 8; use"));
}

TEST(StepRunner, GoesOnWithoutRecordingWhereThatFails) {
  RecordingCpu device;
  device.can_record = false;
  expect_same(train(&device), train(nullptr));
  EXPECT_EQ(device.recorded, 0);
}

}  // namespace
}  // namespace rwkv
