#include <cmath>
#include <map>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

TEST(Rwkv6Logits, MatchRwkvCppOnItsTinyModel) {
  const std::string path = test::find_test_data("rwkv_cpp_tiny/tiny-rwkv-6v0-1m-FP32.bin");
  SKIP_WITHOUT(path);
  auto tensors = test::load_rwkv_cpp(path);
  test::undo_rwkv6_transforms(tensors);
  test::expect_tiny_model(
      test::model_of(
          tensors,
          {.version = "rwkv6", .n_layer = 12, .n_embd = 64, .head_size = 8, .vocab_size = 256}),
      "6v0-1m",
      0);
}
TEST(Rwkv6Logits, OfItsPthAreThoseToo) {
  const std::string path = test::find_test_data("derived/pth_reader/tiny-rwkv-6v0-1m.bf16.pth");
  SKIP_WITHOUT(path);
  test::expect_tiny_model(open_model(path, at::kFloat), "6v0-1m", 0);
}

// ---- Initial values and classes
// ------------------------------------------------------------------

TEST(Rwkv6Init, FollowsTheAuthorsTable) {
  RwkvModel model(ModelConfig{
      .version = "rwkv6", .n_layer = 3, .n_embd = 10, .head_size = 5, .vocab_size = 11});
  model->initialise(1, 1e-3);
  // By hand from the table: layer 1 of 3 has r01 = 1/2, r10 = 2/3; channel 6 of 10 has d = 0.6 and
  // span 6/9, and (6 + 1) mod 3 - 1 is 0; of channel 7 it is 1.
  const double r01 = 0.5, r10 = 2.0 / 3, span = 6.0 / 9;
  const std::map<std::string, double> expected{
      {"att.time_maa_x", 1 - std::pow(0.6, r10)},
      {"att.time_maa_w", 1 - std::pow(0.6, r10)},
      {"att.time_maa_k", 1 - std::pow(0.6, r10)},
      {"att.time_maa_v", 1 - std::pow(0.6, r10) - 0.3 * r01},
      {"att.time_maa_r", 1 - std::pow(0.6, 0.5 * r10)},
      {"att.time_maa_g", 1 - std::pow(0.6, 0.5 * r10)},
      {"ffn.time_maa_k", 1 - std::pow(0.6, std::pow(r10, 3))},
      {"ffn.time_maa_r", 1 - std::pow(0.6, std::pow(r10, 3))},
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
  for (const char* name : {"att.time_maa_w1",
                           "att.time_decay_w1",
                           "att.output.weight",
                           "ffn.value.weight",
                           "ffn.receptance.weight"}) {
    EXPECT_EQ(parameter(name).abs().max().item<float>(), 0) << name;
  }
  for (const char* name : {"att.time_maa_w2", "att.time_decay_w2"}) {
    const float largest = parameter(name).abs().max().item<float>();
    EXPECT_GT(largest, 0.009) << name;
    EXPECT_LE(largest, 0.01f) << name;
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

TEST(Rwkv6Init, HasTheAuthorsSizes) {
  ModelConfig config{.version = "rwkv6", .n_layer = 24, .n_embd = 2048, .vocab_size = 65536};
  find_version_shapes("rwkv6").resolve(config);
  EXPECT_EQ(config.dim_att, 2048);
  EXPECT_EQ(config.dim_ffn, 7168);
  EXPECT_EQ(config.head_size, 64);
  EXPECT_EQ(config.rank_mix, 32);
  EXPECT_EQ(config.rank_decay, 64);
}

TEST(Rwkv6Traits, AreTheAuthorsClasses) {
  RwkvModel model(ModelConfig{.version = "rwkv6", .n_layer = 2, .n_embd = 64, .vocab_size = 11});
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

TEST(Rwkv6Config, RefusesWhatIsNotItsOwn) {
  const auto text = [](ModelConfig config) {
    config.version = "rwkv6";
    return THROWN_TEXT(std::invalid_argument, find_version_shapes("rwkv6").resolve(config));
  };
  EXPECT_EQ(text({.n_embd = 96}), "model.dim_att = 96: must be a multiple of model.head_size, 64");
  EXPECT_EQ(text({.n_embd = 64, .rank_gate = 8}),
            "model.rank_gate = 8: rwkv6 has none; leave the key out");
}

class Rwkv6File : public test::ChangedFile {
 protected:
  Rwkv6File() : ChangedFile("derived/rwkv567_synthetic/v6_weights_fp32.pth") {}
};

TEST_F(Rwkv6File, WithoutATensorNamesIt) {
  tensors_.erase("blocks.2.att.gate.weight");
  EXPECT_THAT(error(), testing::HasSubstr("blocks.2.att.gate.weight is missing"));
}
TEST_F(Rwkv6File, WithHeadsThatDoNotDivideSaysSo) {
  tensors_["blocks.0.att.time_faaaa"] = at::zeros({2, 15});
  EXPECT_THAT(error(), testing::HasSubstr("heads of 15 channels, expected a divisor of the 32"));
}
TEST_F(Rwkv6File, WithOddRanksNamesTheFactor) {
  tensors_["blocks.2.att.time_decay_w1"] = at::zeros({32, 9});
  EXPECT_THAT(error(),
              testing::HasSubstr("blocks.2.att.time_decay_w1 is [32, 9], expected [32, 8]"));
}
TEST_F(Rwkv6File, WithOddMixesSaysHowManyThereAre) {
  tensors_["blocks.0.att.time_maa_w1"] = at::zeros({32, 41});
  EXPECT_THAT(error(), testing::HasSubstr("time_maa_w1 has 41 columns, expected a multiple of 5"));
}

}  // namespace
}  // namespace rwkv
