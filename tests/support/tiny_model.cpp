#include "tests/support/tiny_model.h"

#include <filesystem>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <gtest/gtest.h>

#include "model/state_file.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv::test {

RwkvModel random_model(const std::string& version, int64_t n_layer, int64_t n_embd) {
  ModelConfig config{
      .version = version, .n_layer = n_layer, .n_embd = n_embd, .vocab_size = 48, .ctx_len = 16};
  if (version != "rwkv4") {
    config.head_size = 8;
  }
  RwkvModel model(config);
  model->initialise(1, 1e-4);
  const at::NoGradGuard no_grad;
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{7});
  for (at::Tensor& parameter : model->parameters()) {
    parameter += 0.3 * at::randn(parameter.sizes(), generator);
  }
  return model;
}

RwkvModel model_of(const std::map<std::string, at::Tensor>& tensors, const ModelConfig& config) {
  RwkvModel model(config);
  const at::NoGradGuard no_grad;
  model->set_dtype(at::kFloat);
  auto parameters = model->named_parameters();
  EXPECT_EQ(parameters.size(), tensors.size());
  for (auto& item : parameters) {
    item.value().copy_(tensors.at(item.key()).view_as(item.value()));
  }
  return model;
}

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
  const TempFolder folder;
  const std::string buffer = folder.path("state.bin");
  std::filesystem::copy_file(find_test_data("derived/tiny_logits/state-" + name + ".f32"), buffer);
  const State expected = load_state(buffer, model);
  for (size_t layer = 0; layer < expected.layers.size(); ++layer) {
    const LayerState &x = run.state.layers[layer], &y = expected.layers[layer];
    EXPECT_TRUE(close_l2(x.ffn_shift_BC, y.ffn_shift_BC, 1e-4)) << layer;
    EXPECT_TRUE(close_l2(x.att_shift_BC, y.att_shift_BC, 1e-4)) << layer;
    EXPECT_TRUE(close_l2(x.wkv, y.wkv, 1e-4)) << layer;
  }
  const std::string written = folder.path("written.bin");
  save_state(written, expected, model);
  EXPECT_TRUE(read_file(written) == read_file(buffer));
}

}  // namespace rwkv::test
