#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "model/rwkv_model.h"
#include "model/version_shapes.h"
#include "model/weights.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "tests/support/tiny_model.h"

namespace rwkv {
namespace {

at::Tensor logits_of(RwkvModel model, const at::Tensor& tokens_BT) {
  const at::NoGradGuard no_grad;
  return model->forward(tokens_BT, model->initial_state(tokens_BT.size(0))).logits_BTV;
}

// ---- Against programs and maths that nobody here wrote
// --------------------------------------------

TEST(Rwkv4Logits, MatchTheRwkvPackageAndFloat64) {
  auto golden = test::load_tensors(test::golden("rwkv4_odd_logits.safetensors"));
  const at::Tensor tokens_1T = golden["tokens"].unsqueeze(0);
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  EXPECT_TRUE(test::close_max(logits_of(model, tokens_1T)[0], golden["logits"], 1e-4));
  EXPECT_TRUE(test::close_l2(logits_of(model, tokens_1T)[0], golden["logits_f64"], 6e-7));

  RwkvModel exact = open_model(test::golden("rwkv4_odd.safetensors"), at::kDouble);
  EXPECT_TRUE(test::close_l2(logits_of(exact, tokens_1T)[0], golden["logits_f64"], 1e-12));
}

TEST(Rwkv4State, MatchesTheRwkvPackage) {
  auto golden = test::load_tensors(test::golden("rwkv4_odd_logits.safetensors"));
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  const at::NoGradGuard no_grad;
  const State state = model->forward(golden["tokens"].unsqueeze(0), model->initial_state(1)).state;
  for (size_t layer = 0; layer < state.layers.size(); ++layer) {
    const std::string at = "state." + std::to_string(layer) + ".";
    const LayerState& actual = state.layers[layer];
    EXPECT_TRUE(test::close_max(actual.att_shift_BC[0], golden[at + "att_x"], 1e-4)) << layer;
    EXPECT_TRUE(test::close_max(actual.ffn_shift_BC[0], golden[at + "ffn_x"], 1e-4)) << layer;
    EXPECT_TRUE(test::close_max(actual.wkv[0][0], golden[at + "aa"], 1e-4)) << layer;
    EXPECT_TRUE(test::close_max(actual.wkv[0][1], golden[at + "bb"], 1e-4)) << layer;
    EXPECT_TRUE(test::close_max(actual.wkv[0][2], golden[at + "pp"], 1e-4)) << layer;
  }
}

TEST(Rwkv4Logits, MatchFloat64WithAttentionWiderThanTheModel) {
  auto golden = test::load_tensors(test::golden("rwkv4_wide_att_logits.safetensors"));
  RwkvModel model = open_model(test::golden("rwkv4_wide_att.safetensors"), at::kFloat);
  EXPECT_EQ(model->config().dim_att, 56);
  EXPECT_EQ(model->config().n_layer, 1);
  EXPECT_TRUE(test::close_l2(
      logits_of(model, golden["tokens"].unsqueeze(0))[0], golden["logits_f64"], 6e-7));
}

TEST(Rwkv4Logits, MatchRwkvCppOnItsTinyModel) {
  const std::string weights =
      test::find_test_data("derived/pth_reader/tiny-rwkv-4v0-660K.fp32.pth");
  SKIP_WITHOUT(weights);
  test::expect_tiny_model(open_model(weights, at::kFloat), "4v0-660K", 's');
}

struct Batch2D {
  at::Tensor inputs_BT, targets_BT;
};

// Gradients of the loss by name.
std::map<std::string, at::Tensor> gradients_of(RwkvModel model,
                                               const Batch2D& batch,
                                               double l2wrap) {
  const State empty = model->initial_state(batch.inputs_BT.size(0));
  model->loss(batch.inputs_BT, batch.targets_BT, empty, l2wrap).loss.backward();
  std::map<std::string, at::Tensor> result;
  for (auto& item : model->named_parameters()) {
    result[item.key()] = item.value().grad().clone();
    item.value().mutable_grad().reset();
  }
  return result;
}

TEST(Rwkv4Gradients, MatchFloat64ForEveryParameter) {
  auto golden = test::load_tensors(test::golden("rwkv4_odd_grads.safetensors"));
  const Batch2D batch{golden["inputs"], golden["targets"]};
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
  const auto plain = gradients_of(model, batch, 0);
  const auto wrapped = gradients_of(model, batch, 1e-4);
  for (const auto& [name, gradient] : plain) {
    EXPECT_TRUE(test::close_l2(gradient, golden["ce." + name], 3e-6)) << name;
    EXPECT_TRUE(test::close_l2(wrapped.at(name), golden["ce_l2wrap." + name], 3e-6)) << name;
    // L2Wrap moves a gradient by a thousandth: alone it is seen in the difference.
    EXPECT_TRUE(test::close_l2(
        wrapped.at(name) - gradient, golden["ce_l2wrap." + name] - golden["ce." + name], 5e-3))
        << name;
  }
}

TEST(Rwkv4Loss, IsTheMeanCrossEntropyOfTheLogits) {
  auto golden = test::load_tensors(test::golden("rwkv4_odd_grads.safetensors"));
  const Batch2D batch{golden["inputs"], golden["targets"]};
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kDouble);
  const State empty = model->initial_state(batch.inputs_BT.size(0));
  const ModelOutput output = model->forward(batch.inputs_BT, empty);
  const at::Tensor expected =
      at::nll_loss(at::log_softmax(output.logits_BTV, 2).flatten(0, 1), batch.targets_BT.flatten());
  const auto with_gradient = model->loss(batch.inputs_BT, batch.targets_BT, empty, 1e-4);
  EXPECT_NEAR(with_gradient.loss.item<double>(), expected.item<double>(), 1e-12);
  EXPECT_TRUE(test::same_bits(with_gradient.state.layers.back().wkv.detach(),
                              output.state.layers.back().wkv.detach()));
  const at::NoGradGuard no_grad;
  const auto alone = model->loss(batch.inputs_BT, batch.targets_BT, empty, 1e-4);
  EXPECT_TRUE(test::same_bits(alone.loss, with_gradient.loss.detach()));
  EXPECT_THAT(THROWN_TEXT(c10::Error,
                          model->loss(batch.inputs_BT, batch.targets_BT.slice(1, 1), empty, 1e-4)),
              testing::HasSubstr("but tokens_BT is"));
}

// ---- GPT mode, RNN mode, split
// ---------------------------------------------------------------------

RwkvModel odd_model() {
  return open_model(test::golden("rwkv4_odd.safetensors"), at::kFloat);
}

at::Tensor random_tokens(int64_t batch_size, int64_t seq_len, int64_t vocab_size) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
  return at::randint(vocab_size, {batch_size, seq_len}, generator, at::kLong);
}

TEST(Rwkv4Modes, SequenceTokenByTokenAndSplitAgree) {
  const at::NoGradGuard no_grad;
  RwkvModel model = odd_model();
  const at::Tensor tokens_BT = random_tokens(2, 131, model->config().vocab_size);
  const at::Tensor whole = logits_of(model, tokens_BT);

  State state = model->initial_state(2);
  std::vector<at::Tensor> steps;
  for (int64_t t = 0; t < 131; ++t) {
    auto output = model->forward_last(tokens_BT.slice(1, t, t + 1), state);
    steps.push_back(output.logits_BV);
    state = output.state;
  }
  EXPECT_TRUE(test::close_l2(at::stack(steps, 1), whole, 1e-5));

  State split_state = model->initial_state(2);
  std::vector<at::Tensor> pieces;
  for (const auto& [begin, end] : {std::pair{0, 17}, std::pair{17, 18}, std::pair{18, 131}}) {
    ModelOutput output = model->forward(tokens_BT.slice(1, begin, end), split_state);
    pieces.push_back(output.logits_BTV);
    split_state = output.state;
  }
  EXPECT_TRUE(test::close_l2(at::cat(pieces, 1), whole, 1e-5));
  for (size_t layer = 0; layer < 3; ++layer) {
    EXPECT_TRUE(test::close_l2(split_state.layers[layer].wkv, state.layers[layer].wkv, 1e-5));
  }
}

TEST(Rwkv4Modes, RowsOfABatchDoNotSeeEachOther) {
  RwkvModel model = odd_model();
  const at::Tensor tokens_BT = random_tokens(3, 9, model->config().vocab_size);
  EXPECT_TRUE(test::close_l2(
      logits_of(model, tokens_BT.slice(0, 1, 2))[0], logits_of(model, tokens_BT)[1], 1e-6));
}

TEST(Rwkv4Modes, GradientsFlowThroughTheStateThatIsHandedOver) {
  // One sequence and its two halves, with the state between them, have the same gradients.
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kDouble);
  const at::Tensor tokens = random_tokens(1, 21, model->config().vocab_size);
  const auto collect = [&] {
    std::map<std::string, at::Tensor> result;
    for (auto& item : model->named_parameters()) {
      result[item.key()] = item.value().grad().clone();
      item.value().mutable_grad().reset();
    }
    return result;
  };
  ModelOutput whole = model->forward(tokens, model->initial_state(1));
  whole.logits_BTV.square().sum().backward();
  const auto expected = collect();
  ModelOutput first = model->forward(tokens.slice(1, 0, 8), model->initial_state(1));
  ModelOutput second = model->forward(tokens.slice(1, 8, 21), first.state);
  (first.logits_BTV.square().sum() + second.logits_BTV.square().sum()).backward();
  for (const auto& [name, gradient] : collect()) {
    EXPECT_TRUE(test::close_l2(gradient, expected.at(name), 1e-10)) << name;
  }
}

TEST(Rwkv4Modes, Bf16StaysWithinItsRounding) {
  auto golden = test::load_tensors(test::golden("rwkv4_odd_logits.safetensors"));
  RwkvModel model = open_model(test::golden("rwkv4_odd.safetensors"), at::kBFloat16);
  EXPECT_EQ(model->dtype(), at::kBFloat16);
  for (const auto& item : model->named_parameters()) {
    const bool exact = item.key().ends_with("time_decay") || item.key().ends_with("time_first");
    EXPECT_EQ(item.value().scalar_type(), exact ? at::kFloat : at::kBFloat16) << item.key();
  }
  const at::Tensor logits = logits_of(model, golden["tokens"].unsqueeze(0))[0];
  EXPECT_TRUE(test::close_l2(logits, golden["logits_f64"], 0.03));
}

// ---- Initial values
// --------------------------------------------------------------------------------

at::Tensor parameter(RwkvModel model, const std::string& name) {
  return model->named_parameters()[name].detach();
}

TEST(Rwkv4Init, FollowsTheAuthorsTable) {
  RwkvModel model(
      ModelConfig{.n_layer = 3, .n_embd = 6, .dim_att = 9, .dim_ffn = 20, .vocab_size = 11});
  model->initialise(1, 1e-3);
  // By hand from the table: layer 1 of 3 has r01 = 1/2, r10 = 2/3; channel 2 of 6 has d = 1/3.
  EXPECT_NEAR(parameter(model, "blocks.1.att.time_mix_k")[0][0][2].item<float>(),
              std::pow(1.0 / 3, 2.0 / 3),
              1e-6);
  EXPECT_NEAR(parameter(model, "blocks.1.att.time_mix_v")[0][0][2].item<float>(),
              std::pow(1.0 / 3, 2.0 / 3) + 0.15,
              1e-6);
  EXPECT_NEAR(parameter(model, "blocks.1.att.time_mix_r")[0][0][2].item<float>(),
              std::pow(1.0 / 3, 1.0 / 3),
              1e-6);
  EXPECT_NEAR(parameter(model, "blocks.1.ffn.time_mix_k")[0][0][2].item<float>(),
              std::pow(1.0 / 3, 2.0 / 3),
              1e-6);
  EXPECT_NEAR(parameter(model, "blocks.1.ffn.time_mix_r")[0][0][2].item<float>(),
              std::pow(1.0 / 3, 2.0 / 3),
              1e-6);
  // Channel 4 of 9: h = 1/2.
  EXPECT_NEAR(parameter(model, "blocks.1.att.time_decay")[4].item<float>(),
              -5 + 8 * std::pow(0.5, 0.7 + 0.65),
              1e-5);
  EXPECT_NEAR(parameter(model, "blocks.0.att.time_decay")[8].item<float>(), 3, 1e-5);
  EXPECT_NEAR(parameter(model, "blocks.2.att.time_decay")[0].item<float>(), -5, 1e-6);
  // Zigzag (i + 1) mod 3 - 1 is 0, 1, -1, ...
  EXPECT_NEAR(parameter(model, "blocks.0.att.time_first")[0].item<float>(), std::log(0.3), 1e-6);
  EXPECT_NEAR(
      parameter(model, "blocks.0.att.time_first")[1].item<float>(), std::log(0.3) + 0.5, 1e-6);
  EXPECT_NEAR(
      parameter(model, "blocks.0.att.time_first")[2].item<float>(), std::log(0.3) - 0.5, 1e-6);
  for (const char* name :
       {"att.key", "att.receptance", "att.output", "ffn.receptance", "ffn.value"}) {
    EXPECT_EQ(
        parameter(model, "blocks.2." + std::string(name) + ".weight").abs().max().item<float>(), 0)
        << name;
  }
  for (const char* name : {"blocks.0.ln0", "blocks.1.ln1", "blocks.2.ln2", "ln_out"}) {
    EXPECT_TRUE((parameter(model, std::string(name) + ".weight") == 1).all().item<bool>()) << name;
    EXPECT_TRUE((parameter(model, std::string(name) + ".bias") == 0).all().item<bool>()) << name;
  }
}

// W^T W (or W W^T, the smaller) must be gain^2 times the identity.
void expect_orthogonal(const at::Tensor& weight, double gain) {
  const at::Tensor w = weight.to(at::kDouble);
  const at::Tensor product = w.size(0) >= w.size(1) ? w.t().matmul(w) : w.matmul(w.t());
  EXPECT_TRUE(test::close_max(product, at::eye(product.size(0), at::kDouble) * gain * gain, 1e-5));
}

TEST(Rwkv4Init, MakesMatricesOrthogonalWithTheirGains) {
  RwkvModel model(
      ModelConfig{.n_layer = 2, .n_embd = 24, .dim_att = 30, .dim_ffn = 96, .vocab_size = 200});
  model->initialise(3, 1e-3);
  expect_orthogonal(parameter(model, "head.weight"), 0.5 * std::sqrt(200.0 / 24));
  expect_orthogonal(parameter(model, "blocks.1.att.value.weight"), std::sqrt(30.0 / 24));
  expect_orthogonal(parameter(model, "blocks.1.ffn.key.weight"), 2);
  RwkvModel narrow(ModelConfig{.n_layer = 1, .n_embd = 24, .dim_att = 12, .vocab_size = 20});
  narrow->initialise(3, 1e-3);
  expect_orthogonal(parameter(narrow, "head.weight"), 0.5);
  expect_orthogonal(parameter(narrow, "blocks.0.att.value.weight"), 1);
  const at::Tensor emb = parameter(model, "emb.weight");
  EXPECT_LE(emb.abs().max().item<float>(), 1e-3f);
  EXPECT_NEAR(emb.std().item<float>(), 1e-3 / std::sqrt(3.0), 2e-5);
}

TEST(Rwkv4Init, DependsOnTheSeedAlone) {
  const ModelConfig config{.n_layer = 2, .n_embd = 16, .vocab_size = 20};
  RwkvModel first(config), second(config), third(config);
  first->initialise(7, 1e-3);
  second->initialise(7, 1e-3);
  third->initialise(8, 1e-3);
  EXPECT_TRUE(test::same_bits(parameter(first, "head.weight"), parameter(second, "head.weight")));
  EXPECT_FALSE(test::same_bits(parameter(first, "head.weight"), parameter(third, "head.weight")));
}

TEST(Rwkv4Config, ReadsSizesFromAFile) {
  const RwkvModel model = odd_model();
  EXPECT_EQ(model->config(),
            (ModelConfig{.version = "rwkv4",
                         .n_layer = 3,
                         .n_embd = 40,
                         .dim_att = 40,
                         .dim_ffn = 104,
                         .vocab_size = 97,
                         .ctx_len = 256}));
}

// ---- What does not fit
// -----------------------------------------------------------------------------

// The golden model with a tensor replaced, renamed (new_name) or taken out (empty new_name).
std::string changed_model(const test::TempFolder& folder,
                          const std::string& name,
                          const std::string& new_name,
                          const at::Tensor& value) {
  NamedTensors tensors;
  for (const auto& [key, tensor] : test::load_tensors(test::golden("rwkv4_odd.safetensors"))) {
    if (key != name) {
      tensors.emplace_back(key, tensor);
    } else if (!new_name.empty()) {
      tensors.emplace_back(new_name, value.defined() ? value : tensor);
    }
  }
  const std::string path = folder.path("changed.safetensors");
  write_weights(path, to_write(tensors), {});
  return path;
}

TEST(Rwkv4Shapes, AreThoseOfTheModelsParameters) {
  // Sizes of which none stands in for another.
  const ModelConfig config{
      .n_layer = 3, .n_embd = 32, .dim_att = 48, .dim_ffn = 80, .vocab_size = 77, .ctx_len = 8};
  TensorShapes expected;
  for (const auto& item : RwkvModel(config)->named_parameters()) {
    expected[item.key()] = item.value().sizes().vec();
  }
  EXPECT_EQ(rwkv4_shapes().parameters(config), expected);
}

TEST(OpenModel, NamesTheTensorThatDoesNotFit) {
  const test::TempFolder folder;
  const auto text =
      [&](const std::string& name, const std::string& new_name, const at::Tensor& value) {
        const std::string path = changed_model(folder, name, new_name, value);
        return THROWN_TEXT(std::runtime_error, open_model(path, at::kFloat));
      };
  EXPECT_THAT(text("blocks.2.att.output.weight", "", {}),
              testing::AllOf(testing::HasSubstr("changed.safetensors: "),
                             testing::HasSubstr("blocks.2.att.output.weight is missing")));
  EXPECT_THAT(text("blocks.1.ffn.key.weight", "blocks.1.ffn.key.weight", at::zeros({104, 39})),
              testing::HasSubstr("blocks.1.ffn.key.weight is [104, 39], expected [104, 40]"));
  EXPECT_THAT(text("ln_out.bias", "ln_out.bias2", {}),
              testing::HasSubstr("ln_out.bias is missing"));
  EXPECT_THAT(text("emb.weight", "", {}), testing::HasSubstr("emb.weight is missing"));
  EXPECT_THAT(text("blocks.0.att.time_first", "", {}),
              testing::HasSubstr("no RWKV version known here"));
}

TEST(OpenModel, AcceptsVectorsWithoutTheirAxesOfOne) {
  const test::TempFolder folder;
  auto golden = test::load_tensors(test::golden("rwkv4_odd.safetensors"));
  const std::string name = "blocks.1.att.time_mix_k";
  const std::string path = changed_model(folder, name, name, golden[name].flatten());
  EXPECT_TRUE(test::same_bits(parameter(open_model(path, at::kFloat), name), golden[name]));
}

TEST(FindVersion, ListsTheKnownOnes) {
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument, find_version("rwkv3")),
      testing::HasSubstr(
          "model.version = \"rwkv3\": no such version; known are rwkv7, rwkv6, rwkv5, rwkv4"));
}

}  // namespace
}  // namespace rwkv
