#include <array>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/weights.h"
#include "tests/support/ranks.h"
#include "tests/support/test_data.h"
#include "train/distributed/weight_comparison.h"

namespace rwkv {
namespace {

using testing::HasSubstr;

RwkvModel open_odd(at::ScalarType dtype) {
  return open_model(test::golden("rwkv4_odd.safetensors"), dtype);
}

TEST(WeightsFingerprint, ChangesWithEveryBit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    RwkvModel model = open_odd(dtype);
    const int64_t before = weights_fingerprint(model);
    EXPECT_EQ(weights_fingerprint(open_odd(dtype)), before);
    at::Tensor head = model->named_parameters()["head.weight"].detach().view({-1});
    at::Tensor words = head.view(dtype == at::kFloat ? at::kInt : at::kShort);
    for (const int64_t at : {int64_t{0}, words.numel() - 1}) {
      words[at].bitwise_xor_(1);
      EXPECT_NE(weights_fingerprint(model), before);
      words[at].bitwise_xor_(1);
    }
    EXPECT_EQ(weights_fingerprint(model), before);
    // Two numbers that have changed places.
    const at::Tensor first = head[0].clone();
    head[0].copy_(head[1]);
    head[1].copy_(first);
    EXPECT_NE(weights_fingerprint(model), before);
  }
}

TEST(FindDrift, NamesThoseThatDifferFromTheMost) {
  EXPECT_EQ(find_drift(std::array<int64_t, 3>{5, 5, 5}), "");
  EXPECT_EQ(find_drift(std::array<int64_t, 4>{5, 5, -7, 5}),
            "the weights of rank 2 are not those of the other 3");
  EXPECT_EQ(find_drift(std::array<int64_t, 5>{1, 5, 5, 2, 5}),
            "the weights of ranks 0, 3 are not those of the other 3");
  EXPECT_EQ(find_drift(std::array<int64_t, 2>{5, 6}), "the weights of ranks 0, 1 are not the same");
  EXPECT_EQ(find_drift(std::array<int64_t, 4>{5, 6, 6, 5}),
            "the weights of ranks 0, 1, 2, 3 are not the same");
}

TEST(RequireSameWeights, IsTheSameErrorOnEveryProcess) {
  test::on_ranks(3, [](Communicator& all) {
    RwkvModel model = open_odd(at::kFloat);
    require_same_weights(model, all);
    if (all.rank() == 1) {
      at::NoGradGuard no_grad;
      model->named_parameters()["ln_out.bias"][3].add_(1e-6);
    }
    EXPECT_THAT(THROWN_TEXT(DistributedError, require_same_weights(model, all)),
                HasSubstr("the weights of rank 1 are not those of the other 2"));
  });
}

}  // namespace
}  // namespace rwkv
