#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/generate.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

// How often each of four tokens with probabilities 0.5, 0.3, 0.15, 0.05 is drawn in 4000 draws.
std::vector<double> frequencies(const SamplingOptions& options) {
  const at::Tensor logits_V = at::tensor({0.15, 0.5, 0.05, 0.3}).log();
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{11});
  std::vector<double> counts(4);
  for (int i = 0; i < 4000; ++i) {
    counts[static_cast<size_t>(sample_token(logits_V, options, generator))] += 1.0 / 4000;
  }
  return counts;
}

using testing::DoubleNear;
using testing::ElementsAre;

TEST(SampleToken, FollowsTheProbabilities) {
  EXPECT_THAT(frequencies({}),
              ElementsAre(DoubleNear(0.15, 0.03),
                          DoubleNear(0.5, 0.03),
                          DoubleNear(0.05, 0.02),
                          DoubleNear(0.3, 0.03)));
}

TEST(SampleToken, CutsAtTopP) {
  // 0.5 + 0.3 reaches 0.6, so that two tokens stay.
  EXPECT_THAT(frequencies({.top_p = 0.6}),
              ElementsAre(0, DoubleNear(0.625, 0.03), 0, DoubleNear(0.375, 0.03)));
  EXPECT_THAT(frequencies({.top_p = 0.01}), ElementsAre(0, DoubleNear(1, 1e-9), 0, 0));
}

TEST(SampleToken, CutsAtTopK) {
  EXPECT_THAT(frequencies({.top_k = 1}), ElementsAre(0, DoubleNear(1, 1e-9), 0, 0));
}

TEST(SampleToken, SharpensWithTemperature) {
  // 0.5^2 : 0.3^2 : 0.15^2 : 0.05^2.
  EXPECT_THAT(frequencies({.temperature = 0.5}),
              ElementsAre(DoubleNear(0.0225 / 0.365, 0.02),
                          DoubleNear(0.25 / 0.365, 0.03),
                          DoubleNear(0.0025 / 0.365, 0.01),
                          DoubleNear(0.09 / 0.365, 0.03)));
  EXPECT_THAT(frequencies({.temperature = 0}), ElementsAre(0, DoubleNear(1, 1e-9), 0, 0));
}

TEST(SamplingOptions, RefuseWhatIsOutOfRange) {
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, SamplingOptions{.temperature = -1}.validate()),
              testing::HasSubstr("temperature = -1.0"));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, SamplingOptions{.top_p = 0}.validate()),
              testing::HasSubstr("must be in (0, 1]"));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, SamplingOptions{.top_k = -2}.validate()),
              testing::HasSubstr("top_k = -2"));
}

}  // namespace
}  // namespace rwkv
