// Share of wkv4 in a training step at L6 D384 V256 B8 T256: both timed in turn, medians of nine.
//   build/ci/bin/bench_wkv4 [bf16]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include "model/loss.h"
#include "model/ops/wkv4.h"
#include "train/optimizer.h"

namespace {

using namespace rwkv;

constexpr int64_t kLayers = 6, kEmbd = 384, kVocab = 256, kBatch = 8, kLen = 256;

template <typename Function>
double milliseconds(const Function& function) {
  const auto start = std::chrono::steady_clock::now();
  function();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
      .count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const at::ScalarType dtype =
      argc > 1 && std::string_view(argv[1]) == "bf16" ? at::kBFloat16 : at::kFloat;
  RwkvModel model(ModelConfig{.n_layer = kLayers, .n_embd = kEmbd, .vocab_size = kVocab});
  model->initialise(1, 1e-4);
  Optimizer optimizer(model, {}, dtype);
  const at::Tensor tokens_BT = at::randint(kVocab, {kBatch, kLen}, at::kLong);

  const auto step = [&] {
    optimizer.zero_gradient();
    const ModelOutput output = model->forward(tokens_BT, model->initial_state(kBatch));
    cross_entropy_loss(output.logits_BTV, tokens_BT, 1e-4).backward();
    optimizer.accumulate_gradient();
    optimizer.step(1e-4, optimizer.gradient_norm());
  };
  const auto random = [&] {
    return at::randn({kBatch, kLen, kEmbd}, dtype).set_requires_grad(true);
  };
  const at::Tensor k_BTA = random(), v_BTA = random();
  const at::Tensor w_log_A = -at::rand({kEmbd}), u_A = at::rand({kEmbd});
  const at::Tensor dy_BTA = at::randn({kBatch, kLen, kEmbd}, dtype);
  const at::Tensor state = ops::wkv4_initial_state(kBatch, kEmbd, w_log_A.options());
  const auto wkv4_of_all_layers = [&] {
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      ops::wkv4(w_log_A, k_BTA, v_BTA, u_A, state).y_BTA.backward(dy_BTA);
    }
  };
  step();
  wkv4_of_all_layers();
  std::vector<double> step_ms, wkv4_ms;
  for (int repeat = 0; repeat < 9; ++repeat) {
    step_ms.push_back(milliseconds(step));
    wkv4_ms.push_back(milliseconds(wkv4_of_all_layers));
  }
  std::printf(
      "%s, %d threads: step %.1f ms (%.0f tokens/s), wkv4 of its %d layers %.1f ms: %.1f %%\n",
      dtype == at::kFloat ? "fp32" : "bf16",
      at::get_num_threads(),
      median(step_ms),
      kBatch * kLen / median(step_ms) * 1000,
      static_cast<int>(kLayers),
      median(wkv4_ms),
      100 * median(wkv4_ms) / median(step_ms));
  return 0;
}
