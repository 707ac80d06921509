#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "model/version_shapes.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::HasSubstr;

TEST(VersionShapes, TellEachReleaseApart) {
  struct Expected {
    const char* file;
    const char* version;
    int64_t n_layer, n_embd, head_size;
  };
  for (const Expected& expected : {
           Expected{"derived/rwkv4_synthetic/weights_fp32.pth", "rwkv4", 3, 32, 0},
           Expected{"derived/rwkv567_synthetic/v52_weights_fp32.pth", "rwkv5", 3, 32, 16},
           Expected{"derived/pth_reader/tiny-rwkv-6v0-1m.bf16.pth", "rwkv6", 12, 64, 8},
           Expected{"derived/pth_reader/tiny-rwkv-7v0-834K.bf16.pth", "rwkv7", 12, 64, 64},
       }) {
    const std::string path = test::find_test_data(expected.file);
    SKIP_WITHOUT(path);
    const auto config = describe_shapes(shapes_of(read_weights(path)));
    ASSERT_TRUE(config) << expected.file;
    EXPECT_EQ(config->version, expected.version);
    EXPECT_EQ(config->n_layer, expected.n_layer);
    EXPECT_EQ(config->n_embd, expected.n_embd);
    EXPECT_EQ(config->head_size, expected.head_size);
  }
}

TEST(VersionShapes, OfOtherWeightsAreNothing) {
  EXPECT_FALSE(describe_shapes({{"weight", {2, 3}}}));
  EXPECT_FALSE(describe_shapes({}));
}

TEST(VersionShapes, WithoutTheirSizesAreKnownAllTheSame) {
  const auto config = describe_shapes({{"blocks.0.att.r_k", {2}}, {"emb.weight", {}}});
  ASSERT_TRUE(config);
  EXPECT_EQ(config->version, "rwkv7");
  EXPECT_EQ(config->head_size, 0);
  EXPECT_EQ(config->vocab_size, 0);
}

TEST(VersionShapes, OfABrokenRwkv4NameTheTensor) {
  TensorShapes right = {{"emb.weight", {256, 8}}, {"blocks.0.att.time_mix_k", {1, 1, 8}}};
  for (const std::string block : {"blocks.0.", "blocks.1."}) {
    right[block + "ln1.weight"] = {8};
    right[block + "att.time_first"] = {16};
    right[block + "att.key.weight"] = {16, 8};
    right[block + "ffn.key.weight"] = {32, 8};
  }
  ASSERT_TRUE(rwkv4_shapes().recognises(right));
  const ModelConfig config = rwkv4_shapes().config_of(right);
  EXPECT_EQ(config.n_layer, 2);
  EXPECT_EQ(config.dim_att, 16);
  EXPECT_EQ(config.dim_ffn, 32);

  struct Mistake {
    const char* name;
    std::vector<int64_t> shape;
    const char* text;
  };
  for (const auto& [name, shape, text] : {
           Mistake{"emb.weight", {8}, "emb.weight has 1 axes, expected 2"},
           Mistake{"emb.weight", {int64_t{1} << 62, 0}, "expected [vocab_size, n_embd], both 1"},
           Mistake{"blocks.0.ffn.key.weight",
                   {20'000'000, 0},
                   "blocks.0.ffn.key.weight is [20000000, 0], expected [20000000, 8] beside"},
           Mistake{"blocks.0.att.key.weight", {int64_t{1} << 60, 0}, "blocks.0.att.key.weight is"},
           Mistake{"blocks.0.att.key.weight", {16}, "blocks.0.att.key.weight has 1 axes"},
           Mistake{"blocks.1.ffn.key.weight", {32, 0}, "blocks.1.ffn.key.weight is [32, 0]"},
           Mistake{"blocks.1.ln1.weight", {1}, "blocks.1.ln1.weight is [1], expected [8]"},
           Mistake{"blocks.2.ln1.weight", {8}, "blocks.2.att.key.weight is missing"},
       }) {
    TensorShapes shapes = right;
    shapes[name] = shape;
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, rwkv4_shapes().config_of(shapes)), HasSubstr(text))
        << name;
  }
}

}  // namespace
}  // namespace rwkv
