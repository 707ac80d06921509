#include <cmath>
#include <map>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "model/ops/wkv6.h"
#include "model/rwkv5.h"
#include "model/rwkv_model.h"
#include "model/version_shapes.h"
#include "model/weights.h"
#include "tests/support/changed_file.h"
#include "tests/support/rwkv_cpp_file.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "tests/support/tiny_model.h"

namespace rwkv {
namespace {

// Of rwkv.cpp's tiny models, which want an epsilon of their own.
ModelConfig tiny_config() {
  return {.version = "rwkv5",
          .n_layer = 12,
          .n_embd = 64,
          .dim_ffn = 256,
          .head_size = 8,
          .group_norm_eps = 1e-5,
          .vocab_size = 256};
}

TEST(Rwkv5Logits, MatchRwkvCppOnItsTinyModel) {
  const std::string path = test::find_test_data("rwkv_cpp_tiny/tiny-rwkv-5v2-730K-FP32.bin");
  SKIP_WITHOUT(path);
  auto tensors = test::load_rwkv_cpp(path);
  test::undo_rwkv5_transforms(tensors);
  test::expect_tiny_model(test::model_of(tensors, tiny_config()), "5v2-730K", 'p');
}

// 5.1 as rwkv.cpp counts: one decay and one bonus for each head, and no gate. No file of it can be
// opened; that the op and the parts of 5.2 compute it as well is one more witness for them.
struct TimeMix51 : Rwkv5TimeMix {
  using Rwkv5TimeMix::Rwkv5TimeMix;
  TimeMixOutput forward(const TimeMixInput& input) override {
    const ops::Wkv6Output wkv = ops::wkv6({.r_BTC = receptance(input.mixed_J[2]),
                                           .w_raw_BTC = {},
                                           .k_BTC = key(input.mixed_J[0]),
                                           .v_BTC = value(input.mixed_J[1])},
                                          time_decay.flatten(),
                                          time_faaaa.flatten(),
                                          input.wkv);
    const at::Tensor y_MA =
        at::group_norm(wkv.y_BTC.flatten(0, 1), time_faaaa.size(0), ln_x->weight, ln_x->bias, 1e-5);
    return {.y_BTC = output(y_MA.view_as(wkv.y_BTC)), .wkv = wkv.state_BHNN};
  }
};

TEST(Rwkv5Logits, MatchRwkvCppOnItsTinyModelOf51) {
  const std::string path = test::find_test_data("rwkv_cpp_tiny/tiny-rwkv-5v1-730K-FP32.bin");
  SKIP_WITHOUT(path);
  auto tensors = test::load_rwkv_cpp(path);
  test::undo_rwkv5_transforms(tensors);
  const ModelConfig config = tiny_config();
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string att = "blocks." + std::to_string(layer) + ".att.";
    for (const char* name : {"time_decay", "time_faaaa"}) {
      tensors[att + name] = tensors[att + name].expand({8, 8});
    }
    tensors[att + "time_mix_g"] = at::zeros({64});
    tensors[att + "gate.weight"] = at::zeros({64, 64});
  }
  RwkvModel model = test::model_of(tensors, config);
  for (const auto& child : model->named_children()["blocks"]->children()) {
    auto* const block = child->as<BlockImpl>();
    const auto att = std::make_shared<TimeMix51>(model->config());
    const at::NoGradGuard no_grad;
    for (auto& item : att->named_parameters()) {
      item.value().copy_(block->att->named_parameters()[item.key()]);
    }
    block->att = att;
  }
  test::expect_tiny_model(model, "5v1-730K", 'p');
}

// ---- Initial values and classes
// ------------------------------------------------------------------

TEST(Rwkv5Init, FollowsTheAuthorsTable) {
  RwkvModel model(ModelConfig{
      .version = "rwkv5", .n_layer = 3, .n_embd = 10, .head_size = 5, .vocab_size = 11});
  model->initialise(1, 1e-3);
  // By hand from the table: layer 1 of 3 has r01 = 1/2, r10 = 2/3; channel 6 of 10 has d = 0.6 and
  // span 6/9, and (6 + 1) mod 3 - 1 is 0; of channel 7 it is 1.
  const double r01 = 0.5, r10 = 2.0 / 3, span = 6.0 / 9;
  const std::map<std::string, double> expected{
      {"att.time_mix_k", std::pow(0.6, r10)},
      {"att.time_mix_v", std::pow(0.6, r10) + 0.3 * r01},
      {"att.time_mix_r", std::pow(0.6, 0.5 * r10)},
      {"att.time_mix_g", std::pow(0.6, 0.5 * r10)},
      {"ffn.time_mix_k", std::pow(0.6, r10)},
      {"ffn.time_mix_r", std::pow(0.6, r10)},
      {"att.time_decay", -6 + 5 * std::pow(span, 0.7 + 1.3 * r01)},
      {"att.time_faaaa", r01 * (1 - span)},
      {"att.ln_x.weight", std::pow(r10, 0.7)},
      {"att.ln_x.bias", 0},
      {"ln1.weight", 1},
      {"ln2.bias", 0}};
  const auto parameter = [&](const std::string& name) {
    return model->named_parameters()["blocks.1." + name].detach();
  };
  for (const auto& [name, value] : expected) {
    EXPECT_NEAR(parameter(name).flatten()[6].item<double>(), value, 1e-6) << name;
  }
  EXPECT_NEAR(parameter("att.time_faaaa").flatten()[7].item<double>(), r01 * 2 / 9 + 0.1, 1e-6);
  for (const char* name : {"att.output.weight", "ffn.value.weight", "ffn.receptance.weight"}) {
    EXPECT_EQ(parameter(name).abs().max().item<float>(), 0) << name;
  }
  // Orthonormal columns, times the gain.
  for (const auto& [name, gain] : {std::pair{"att.receptance.weight", 1.0},
                                   std::pair{"att.value.weight", 1.0},
                                   std::pair{"ffn.key.weight", 1.0},
                                   std::pair{"att.key.weight", 0.1},
                                   std::pair{"att.gate.weight", 0.1}}) {
    const at::Tensor w = parameter(name).to(at::kDouble);
    EXPECT_TRUE(test::close_max(w.t().matmul(w), at::eye(10, at::kDouble) * gain * gain, 1e-5))
        << name;
  }
}

TEST(Rwkv5Init, HasTheAuthorsSizes) {
  ModelConfig config{.version = "rwkv5", .n_layer = 24, .n_embd = 2048, .vocab_size = 65536};
  find_version_shapes("rwkv5").resolve(config);
  EXPECT_EQ(config.dim_att, 2048);
  EXPECT_EQ(config.dim_ffn, 7168);
  EXPECT_EQ(config.head_size, 64);
}

TEST(Rwkv5Traits, AreTheAuthorsClasses) {
  RwkvModel model(ModelConfig{.version = "rwkv5", .n_layer = 2, .n_embd = 64, .vocab_size = 11});
  for (const auto& item : model->named_parameters()) {
    const std::string& name = item.key();
    const ParameterTraits traits = model->traits(name, item.value().sizes());
    EXPECT_EQ(traits.lr_scale, name.ends_with(".time_decay") ? 2 : 1) << name;
    EXPECT_EQ(traits.keep_fp32, matches_any({"*.time_decay", "*.time_faaaa"}, name)) << name;
    const bool is_matrix = name == "emb.weight" || name == "head.weight" ||
                           matches_any({"*.receptance.weight",
                                        "*.key.weight",
                                        "*.value.weight",
                                        "*.gate.weight",
                                        "*.output.weight"},
                                       name);
    EXPECT_EQ(traits.weight_decay, is_matrix) << name;
  }
}

// ---- What does not fit
// ---------------------------------------------------------------------------

TEST(Rwkv5Config, RefusesWhatIsNotItsOwn) {
  const auto text = [](ModelConfig config) {
    config.version = "rwkv5";
    return THROWN_TEXT(std::invalid_argument, find_version_shapes("rwkv5").resolve(config));
  };
  EXPECT_EQ(text({.n_embd = 96}), "model.dim_att = 96: must be a multiple of model.head_size, 64");
  EXPECT_EQ(text({.n_embd = 64, .rank_gate = 8}),
            "model.rank_gate = 8: rwkv5 has none; leave the key out");
}

class Rwkv5File : public test::ChangedFile {
 protected:
  Rwkv5File() : ChangedFile("derived/rwkv567_synthetic/v52_weights_fp32.pth") {}
};

TEST_F(Rwkv5File, WithoutATensorNamesIt) {
  tensors_.erase("blocks.2.att.gate.weight");
  EXPECT_THAT(error(), testing::HasSubstr("blocks.2.att.gate.weight is missing"));
}
TEST_F(Rwkv5File, WithHeadsThatDoNotDivideSaysSo) {
  tensors_["blocks.0.att.time_faaaa"] = at::zeros({2, 15});
  EXPECT_THAT(error(), testing::HasSubstr("heads of 15 channels, expected a divisor of the 32"));
}
// The previews had one decay a head: nothing here computes them.
TEST_F(Rwkv5File, OfAPreviewIsRefusedByItsName) {
  for (const char* block : {"blocks.0.", "blocks.1.", "blocks.2."}) {
    tensors_[block + std::string("att.time_decay")] = at::zeros({2});
  }
  EXPECT_THAT(error(),
              testing::HasSubstr("is rwkv5.0 or rwkv5.1, previews with one decay for each head"));
  const auto told = describe_shapes(shapes_of(read_weights(path())));
  ASSERT_TRUE(told);
  EXPECT_EQ(told->version, "rwkv5.0 or rwkv5.1");
  EXPECT_EQ(told->n_embd, 32);
}

}  // namespace
}  // namespace rwkv
