// Recomputation changes memory and time, not a single bit.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "model/recompute.h"
#include "model/rwkv_model.h"
#include "model/weights.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

constexpr Recompute kAll[] = {Recompute::kNone, Recompute::kMixes, Recompute::kBlocks};

RwkvModel model_with(Recompute recompute, at::ScalarType dtype) {
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), dtype);
  model->set_recompute(recompute);
  for (at::Tensor parameter : model->parameters()) {
    parameter.requires_grad_(true);
  }
  return model;
}

at::Tensor tokens_of(RwkvModel model, int64_t offset, int64_t length = 13) {
  return (at::arange(2 * length).view({2, length}) * 7 + offset)
      .remainder(model->config().vocab_size);
}

// Loss, states after, then gradients of all parameters and of the states before, over a sequence in
// two parts.
std::vector<at::Tensor> two_parts(RwkvModel model, int64_t length) {
  State state = model->initial_state(2);
  std::vector<at::Tensor> leaves;
  for (LayerState& layer : state.layers) {
    for (at::Tensor* tensor : {&layer.att_shift_BC, &layer.ffn_shift_BC, &layer.wkv}) {
      *tensor = tensor->detach().set_requires_grad(true);
      leaves.push_back(*tensor);
    }
  }
  const auto first =
      model->loss(tokens_of(model, 0, length), tokens_of(model, 1, length), state, 1e-4);
  const auto second =
      model->loss(tokens_of(model, 2, length), tokens_of(model, 3, length), first.state, 1e-4);
  std::vector<at::Tensor> results{first.loss.detach(), second.loss.detach()};
  for (const LayerState& layer : second.state.layers) {
    results.push_back(layer.wkv.detach().clone());
  }
  (first.loss + second.loss).backward();
  for (const at::Tensor& parameter : model->parameters()) {
    leaves.push_back(parameter);
  }
  for (const at::Tensor& leaf : leaves) {
    results.push_back(leaf.grad().defined() ? leaf.grad().clone() : at::zeros_like(leaf));
  }
  return results;
}

TEST(Recompute, GivesTheSameBits) {
  // Of one token a row, products of a few rows are among them.
  for (const auto& [dtype, length] : {std::pair<at::ScalarType, int64_t>{at::kFloat, 13},
                                      {at::kFloat, 1},
                                      {at::kBFloat16, 13},
                                      {at::kBFloat16, 1}}) {
    const auto expected = two_parts(model_with(Recompute::kNone, dtype), length);
    EXPECT_GT(expected.back().abs().max().item<double>(), 0);
    for (const Recompute recompute : kAll) {
      const auto actual = two_parts(model_with(recompute, dtype), length);
      ASSERT_EQ(actual.size(), expected.size());
      for (size_t i = 0; i < expected.size(); ++i) {
        EXPECT_TRUE(test::same_bits(actual[i], expected[i]))
            << "result " << i << " with " << static_cast<int>(recompute) << " in " << dtype;
      }
    }
  }
}

TEST(Recompute, HonoursFrozenParameters) {
  std::vector<std::vector<at::Tensor>> gradients;
  for (const Recompute recompute : kAll) {
    RwkvModel model = model_with(recompute, at::kFloat);
    for (auto& item : model->named_parameters()) {
      // The embedding, so that no input of the first block needs a gradient.
      if (item.key() == "emb.weight" || item.key() == "blocks.0.ffn.key.weight") {
        item.value().requires_grad_(false);
      }
    }
    model->loss(tokens_of(model, 0), tokens_of(model, 1), model->initial_state(2), 0)
        .loss.backward();
    EXPECT_FALSE(model->named_parameters()["emb.weight"].grad().defined());
    EXPECT_FALSE(model->named_parameters()["blocks.0.ffn.key.weight"].grad().defined());
    std::vector<at::Tensor> of_model;
    for (const at::Tensor& parameter : model->parameters()) {
      of_model.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros({}));
    }
    gradients.push_back(of_model);
  }
  for (size_t i = 0; i < gradients[0].size(); ++i) {
    EXPECT_TRUE(test::same_bits(gradients[1][i], gradients[0][i])) << i;
    EXPECT_TRUE(test::same_bits(gradients[2][i], gradients[0][i])) << i;
  }
}

TEST(Recompute, WithoutGradientsKeepsWhatItReturns) {
  const at::NoGradGuard no_grad;
  RwkvModel plain = model_with(Recompute::kNone, at::kFloat);
  const at::Tensor tokens_BT = tokens_of(plain, 0);
  const at::Tensor expected = plain->forward(tokens_BT, plain->initial_state(2)).logits_BTV;
  for (const Recompute recompute : kAll) {
    RwkvModel model = model_with(recompute, at::kFloat);
    EXPECT_TRUE(
        test::same_bits(model->forward(tokens_BT, model->initial_state(2)).logits_BTV, expected));
  }
}

TEST(DropUntilBackward, GivesTheMemoryBackUntilThen) {
  const at::Tensor x = at::rand({8, 4}).set_requires_grad(true);
  const at::Tensor weight = at::rand({4, 4}).set_requires_grad(true);
  const at::Tensor doubled = x * 2;
  const at::Tensor y = at::mm(doubled, weight);
  int calls = 0;
  drop_until_backward({doubled}, {y}, [&] {
    ++calls;
    return std::vector{x.detach() * 2};
  });
  EXPECT_EQ(doubled.storage().data(), nullptr);
  EXPECT_EQ(calls, 0);
  y.sum().backward();
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(test::same_bits(weight.grad(), at::mm((x.detach() * 2).t(), at::ones({8, 4}))));
}

}  // namespace
}  // namespace rwkv
