#include "tests/support/tiny_model.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv::test {

void expect_tiny_model(RwkvModel model, const std::string& name, int64_t likeliest) {
  const at::NoGradGuard no_grad;
  const auto raw = [](const std::string& file, at::ScalarType dtype, at::IntArrayRef shape) {
    return load_raw(find_test_data(file), dtype, shape);
  };
  const auto short_run =
      model->forward(at::tensor({34, 105, 110}, at::kLong).unsqueeze(0), model->initial_state(1));
  EXPECT_TRUE(close_max(short_run.logits_BTV[0][2],
                        raw("rwkv_cpp_tiny/expected-logits-" + name + ".bin", at::kFloat, {256}),
                        2e-5));
  EXPECT_EQ(short_run.logits_BTV[0][2].argmax().item<int64_t>(), likeliest);

  const at::Tensor bytes =
      raw("derived/tiny_logits/prompt64.bytes", at::kByte, {1, 64}).to(at::kLong);
  const auto run = model->forward(bytes, model->initial_state(1));
  EXPECT_TRUE(close_max(run.logits_BTV[0],
                        raw("derived/tiny_logits/logits-" + name + ".f32", at::kFloat, {64, 256}),
                        2e-5));
  // Per layer: ffn row [C], att row [C], S [head][key][value].
  const ModelConfig& config = model->config();
  const int64_t C = config.n_embd, N = config.head_size;
  const at::Tensor states = raw(
      "derived/tiny_logits/state-" + name + ".f32", at::kFloat, {config.n_layer, 2 * C + C * N});
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const LayerState& actual = run.state.layers[static_cast<size_t>(layer)];
    const at::Tensor expected = states[layer];
    EXPECT_TRUE(close_l2(actual.ffn_shift_BC[0], expected.slice(0, 0, C), 1e-4));
    EXPECT_TRUE(close_l2(actual.att_shift_BC[0], expected.slice(0, C, 2 * C), 1e-4));
    EXPECT_TRUE(close_l2(actual.wkv[0], expected.slice(0, 2 * C).view({C / N, N, N}), 1e-4));
  }
}

}  // namespace rwkv::test
