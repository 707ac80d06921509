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
  const TensorShapes shapes = {
      {"blocks.0.att.time_first", {8}}, {"blocks.0.att.time_mix_k", {8}}, {"emb.weight", {8}}};
  EXPECT_TRUE(is_rwkv4(shapes));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, rwkv4_config_of(shapes)),
              HasSubstr("emb.weight has 1 axes, expected 2"));
}

}  // namespace
}  // namespace rwkv
