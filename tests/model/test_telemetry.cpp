#include <cmath>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/rwkv_model.h"
#include "model/telemetry.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_model.h"

namespace rwkv {
namespace {

using test::random_model;

const at::Tensor kTokens = at::arange(24, at::kLong).view({3, 8});

ModelTelemetry telemetry_of(RwkvModel model) {
  return model->telemetry(kTokens, model->initial_state(3));
}

TEST(Telemetry, IsOfTheForwardPassOfEveryVersion) {
  const at::NoGradGuard no_grad;
  for (const std::string version : {"rwkv4", "rwkv5", "rwkv6", "rwkv7"}) {
    RwkvModel model = random_model(version);
    const ModelOutput output = model->forward(kTokens, model->initial_state(3));
    const ModelTelemetry telemetry = telemetry_of(model);
    EXPECT_NEAR(telemetry.largest_logit.item<float>(), output.logits_BTV.max().item<float>(), 1e-5)
        << version;
    ASSERT_EQ(telemetry.by_layer.contains("state_norm"), version != "rwkv4");
    if (version != "rwkv4") {
      for (int64_t layer = 0; layer < 2; ++layer) {
        for (int64_t head = 0; head < 2; ++head) {
          const at::Tensor wkv =
              output.state.layers[static_cast<size_t>(layer)].wkv.select(1, head);
          float largest = 0;
          for (int64_t row = 0; row < 3; ++row) {
            largest = std::max(largest, wkv[row].square().sum().sqrt().item<float>());
          }
          EXPECT_NEAR(telemetry.by_layer.at("state_norm")[layer][head].item<float>(),
                      largest,
                      1e-5 * largest)
              << version;
        }
      }
    }
  }
}

void set(RwkvModel model, const std::string& name, const at::Tensor& value) {
  const at::NoGradGuard no_grad;
  at::Tensor parameter = model->named_parameters()[name];
  parameter.copy_(value.view_as(parameter));
}

TEST(Telemetry, TellsHeadsThatForgetNothingAndRatesThatAreFlat) {
  RwkvModel model = random_model("rwkv7");
  const at::Tensor halves = at::cat({at::full({8}, -1.0), at::full({8}, 1.0)});
  for (const char* name : {"w2", "a2"}) {
    set(model,
        "blocks.1.att." + std::string(name),
        at::zeros_like(model->named_parameters()["blocks.1.att." + std::string(name)]));
  }
  // A quarter of the first head's channels with 1 - w = 3e-4, the second head's with 0.45.
  at::Tensor w0 = 10 * halves;
  w0.slice(0, 0, 8) = 0;
  w0.slice(0, 0, 2) = -7.6;
  set(model, "blocks.1.att.w0", w0);
  set(model, "blocks.1.att.a0", 5 * halves);
  const auto layer = telemetry_of(model).by_layer;
  const auto expect = [&](const char* name, float first, float second) {
    EXPECT_EQ(layer.at(name).sizes(), at::IntArrayRef({2, 2})) << name;
    EXPECT_EQ(layer.at(name)[1][0].item<float>(), first) << name;
    EXPECT_EQ(layer.at(name)[1][1].item<float>(), second) << name;
  };
  expect("decay_slow", 0.25, 0);
  expect("iclr_low", 1, 0);
  expect("iclr_high", 0, 1);
}

// w = exp(-exp(decay)): of a quarter of the first head's channels 1 - w is 9e-4, of the others 0.6.
TEST(Telemetry, TellsSlowDecaysOfVersions5And6) {
  at::Tensor decay = at::zeros({16});
  decay.slice(0, 0, 2) = -7;
  for (const std::string version : {"rwkv5", "rwkv6"}) {
    RwkvModel model = random_model(version);
    set(model, "blocks.1.att.time_decay", decay);
    if (version == "rwkv6") {
      const char* name = "blocks.1.att.time_decay_w2";
      set(model, name, at::zeros_like(model->named_parameters()[name]));
    }
    const at::Tensor slow = telemetry_of(model).by_layer.at("decay_slow");
    EXPECT_EQ(slow.sizes(), at::IntArrayRef({2, 2})) << version;
    EXPECT_EQ(slow[1][0].item<float>(), 0.25) << version;
    EXPECT_EQ(slow[1][1].item<float>(), 0) << version;
  }
}

// What a token reads decides over RWKV-6's decay: a share of tokens, not of channels alone.
TEST(Telemetry, OfDecaysFollowsTheTokensOfRwkv6) {
  RwkvModel model = random_model("rwkv6");
  const at::Tensor w2 = model->named_parameters()["blocks.0.att.time_decay_w2"];
  set(model, "blocks.0.att.time_decay", at::full({16}, std::log(1e-3)));
  set(model, "blocks.0.att.time_decay_w2", w2.sign());
  const at::Tensor slow = telemetry_of(model).by_layer.at("decay_slow")[0];
  EXPECT_GT(slow.min().item<float>(), 0);
  EXPECT_LT(slow.max().item<float>(), 1);
}

TEST(Telemetry, VersionWithoutHeadsCountsAsOne) {
  RwkvModel model = random_model("rwkv4");
  at::Tensor decay = at::zeros({16});
  decay.slice(0, 0, 4) = -7;
  set(model, "blocks.0.att.time_decay", decay);
  const auto by_layer = telemetry_of(model).by_layer;
  EXPECT_EQ(by_layer.at("decay_slow").sizes(), at::IntArrayRef({2, 1}));
  EXPECT_EQ(by_layer.at("decay_slow")[0][0].item<float>(), 0.25);
  EXPECT_EQ(by_layer.size(), 1);
}

TEST(Telemetry, WhatIsNoNumberShows) {
  RwkvModel model = random_model("rwkv7");
  set(model, "blocks.0.att.value.weight", at::full({16, 16}, NAN));
  const ModelTelemetry telemetry = telemetry_of(model);
  EXPECT_TRUE(std::isnan(telemetry.largest_logit.item<float>()));
  EXPECT_TRUE(telemetry.by_layer.at("state_norm").isnan().all().item<bool>());
}

TEST(Telemetry, OfBf16IsThatOfFp32) {
  RwkvModel model = random_model("rwkv7");
  const auto exact = telemetry_of(model).by_layer;
  model->set_dtype(at::kBFloat16);
  const auto rounded = telemetry_of(model).by_layer;
  EXPECT_TRUE(test::close_l2(rounded.at("state_norm"), exact.at("state_norm"), 0.03));
  EXPECT_EQ(rounded.at("decay_slow").scalar_type(), at::kFloat);
}

}  // namespace
}  // namespace rwkv
