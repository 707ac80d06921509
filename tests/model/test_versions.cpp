// What every version must do, over small random weights whose logits and gradients somebody else
// has computed in float64.
#include <map>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/rwkv_model.h"
#include "model/version_shapes.h"
#include "model/weights.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

// Weights PREFIX_weights_fp32.pth and their golden data under derived/; B2, V48.
struct Synthetic {
  const char* version;
  const char* prefix;
  const char* tokens;
  const char* logits;
  int64_t length;
  double loss;
  // Relative L2 error of these logits when plain Torch computes them in bf16, the wkv recurrence in
  // fp32. RWKV-6's mixes depend on the data, and pass rounding on: over 64 other sequences plain
  // Torch is off by 0.032 there and the model by 0.031.
  double plain_bf16_error;
};
void PrintTo(const Synthetic& synthetic, std::ostream* out) {
  *out << synthetic.version;
}
constexpr Synthetic kSynthetic[] = {
    {"rwkv4",
     "rwkv4_synthetic/",
     "tokens_i32_2x21.bin",
     "logits_f64_2x20x48.bin",
     20,
     4.246744724592618,
     0.0093},
    {"rwkv5",
     "rwkv567_synthetic/v52_",
     "tokens_i32_2x17.bin",
     "logits_f64_2x16x48.bin",
     16,
     4.340397897140612,
     0.0152},
    {"rwkv6",
     "rwkv567_synthetic/v6_",
     "tokens_i32_2x17.bin",
     "logits_f64_2x16x48.bin",
     16,
     4.510141545967617,
     0.0325},
    {"rwkv7",
     "rwkv567_synthetic/v7_",
     "tokens_i32_2x17.bin",
     "logits_f64_2x16x48.bin",
     16,
     4.21730087411944,
     0.0214},
};

struct Batch2D {
  at::Tensor inputs_BT, targets_BT;
};

class Versions : public testing::TestWithParam<Synthetic> {
 protected:
  void SetUp() override {
    const std::string weights = file("weights_fp32.pth");
    SKIP_WITHOUT(weights);
    const int64_t length = GetParam().length;
    const at::Tensor tokens =
        test::load_raw(file(GetParam().tokens), at::kInt, {2, length + 1}).to(at::kLong);
    batch_ = {tokens.slice(1, 0, length), tokens.slice(1, 1, length + 1)};
  }
  static std::string file(const std::string& name) {
    return test::find_test_data("derived/" + std::string(GetParam().prefix) + name);
  }
  static RwkvModel open(at::ScalarType dtype) {
    RwkvModel model = open_model(file("weights_fp32.pth"), dtype);
    EXPECT_EQ(model->config().version, GetParam().version);
    return model;
  }

  Batch2D batch_;
};

at::Tensor logits_of(RwkvModel model, const at::Tensor& tokens_BT) {
  const at::NoGradGuard no_grad;
  return model->forward(tokens_BT, model->initial_state(tokens_BT.size(0))).logits_BTV;
}

// Gradients by name, and none left in the model. Of a parameter that nothing reads: undefined.
std::map<std::string, at::Tensor> take_gradients(RwkvModel model) {
  std::map<std::string, at::Tensor> result;
  for (auto& item : model->named_parameters()) {
    at::Tensor& gradient = item.value().mutable_grad();
    result[item.key()] = gradient.defined() ? gradient.clone() : gradient;
    gradient.reset();
  }
  return result;
}

at::Tensor random_tokens(int64_t batch_size, int64_t seq_len, int64_t vocab_size) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
  return at::randint(vocab_size, {batch_size, seq_len}, generator, at::kLong);
}

TEST_P(Versions, LogitsMatchFloat64) {
  const at::Tensor expected =
      test::load_raw(file(GetParam().logits), at::kDouble, {2, GetParam().length, 48});
  EXPECT_TRUE(test::close_max(logits_of(open(at::kFloat), batch_.inputs_BT), expected, 2e-5));
  EXPECT_TRUE(test::close_max(logits_of(open(at::kDouble), batch_.inputs_BT), expected, 1e-13));
  EXPECT_TRUE(test::close_l2(
      logits_of(open(at::kBFloat16), batch_.inputs_BT), expected, 2 * GetParam().plain_bf16_error));
}

TEST_P(Versions, EveryGradientMatchesFloat64) {
  // RWKV-6's mixes multiply what rounding leaves: without fused multiply-adds it comes to 4e-5.
  const double in_fp32 = GetParam().version == std::string_view("rwkv6") ? 1e-4 : 1e-5;
  for (const auto& [name, l2wrap] :
       {std::pair{"grads_ce_fp32.pth", 0.0}, std::pair{"grads_ce_l2wrap_fp32.pth", 1e-4}}) {
    auto golden = test::load_tensors(file(name));
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      RwkvModel model = open(dtype);
      const auto out =
          model->loss(batch_.inputs_BT, batch_.targets_BT, model->initial_state(2), l2wrap);
      EXPECT_NEAR(out.loss.item<double>(), GetParam().loss, dtype == at::kFloat ? 1e-6 : 1e-9);
      out.loss.backward();
      const auto gradients = take_gradients(model);
      size_t compared = 0;
      for (const auto& [parameter, gradient] : gradients) {
        if (!golden.contains(parameter)) {
          EXPECT_TRUE(matches_any(find_version_shapes(GetParam().version).unused, parameter))
              << parameter;
          EXPECT_FALSE(gradient.defined()) << parameter;
          continue;
        }
        ++compared;
        // The golden ones are rounded to fp32.
        EXPECT_TRUE(test::close_l2(
            gradient, golden[parameter].view_as(gradient), dtype == at::kFloat ? in_fp32 : 2e-7))
            << parameter;
      }
      EXPECT_EQ(compared, golden.size());
    }
  }
}

TEST_P(Versions, SequenceTokenByTokenAndSplitAgree) {
  const at::NoGradGuard no_grad;
  RwkvModel model = open(at::kFloat);
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
  for (size_t layer = 0; layer < state.layers.size(); ++layer) {
    EXPECT_TRUE(test::close_l2(split_state.layers[layer].wkv, state.layers[layer].wkv, 1e-5));
  }
}

TEST_P(Versions, TenThousandTokensInRandomPiecesAreOneSequence) {
  const at::NoGradGuard no_grad;
  RwkvModel model = open(at::kFloat);
  const at::Tensor tokens_BT = random_tokens(1, 10'000, model->config().vocab_size);
  const ModelOutput whole = model->forward(tokens_BT, model->initial_state(1));
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{9});
  State state = model->initial_state(1);
  std::vector<at::Tensor> pieces;
  for (int64_t begin = 0, end = 0; begin < 10'000; begin = end) {
    end = std::min<int64_t>(10'000,
                            begin + at::randint(1, 400, {}, generator, at::kLong).item<int64_t>());
    ModelOutput output = model->forward(tokens_BT.slice(1, begin, end), state);
    pieces.push_back(output.logits_BTV);
    state = output.state;
  }
  EXPECT_TRUE(test::close_l2(at::cat(pieces, 1), whole.logits_BTV, 1e-5));
  EXPECT_TRUE(test::close_l2(state.layers.back().wkv, whole.state.layers.back().wkv, 1e-5));
}

TEST_P(Versions, RowsOfABatchDoNotSeeEachOther) {
  RwkvModel model = open(at::kFloat);
  const at::Tensor tokens_BT = random_tokens(3, 9, model->config().vocab_size);
  EXPECT_TRUE(test::close_l2(
      logits_of(model, tokens_BT.slice(0, 1, 2))[0], logits_of(model, tokens_BT)[1], 1e-6));
}

TEST_P(Versions, GradientsFlowThroughTheStateThatIsHandedOver) {
  // One sequence and its two halves, with the state between them, have the same gradients.
  RwkvModel model = open(at::kDouble);
  const at::Tensor tokens = random_tokens(1, 21, model->config().vocab_size);
  ModelOutput whole = model->forward(tokens, model->initial_state(1));
  whole.logits_BTV.square().sum().backward();
  const auto expected = take_gradients(model);
  ModelOutput first = model->forward(tokens.slice(1, 0, 8), model->initial_state(1));
  ModelOutput second = model->forward(tokens.slice(1, 8, 21), first.state);
  (first.logits_BTV.square().sum() + second.logits_BTV.square().sum()).backward();
  for (const auto& [name, gradient] : take_gradients(model)) {
    if (gradient.defined()) {
      EXPECT_TRUE(test::close_l2(gradient, expected.at(name), 1e-9)) << name;
    }
  }
}

// Loss, the state after, then the gradients of parameters and of the state before.
std::vector<at::Tensor> run_with(RwkvModel model, const Batch2D& batch, Recompute recompute) {
  model->set_recompute(recompute);
  State state = model->initial_state(2);
  std::vector<at::Tensor> results;
  for (LayerState& layer : state.layers) {
    layer.wkv.set_requires_grad(true);
    layer.att_shift_BC.set_requires_grad(true);
  }
  const auto out = model->loss(batch.inputs_BT, batch.targets_BT, state, 1e-4);
  results = {out.loss.detach(), out.state.layers.back().wkv.detach().clone()};
  (out.loss + out.state.layers.back().wkv.square().mean()).backward();
  for (const auto& [name, gradient] : take_gradients(model)) {
    if (gradient.defined()) {
      results.push_back(gradient);
    }
  }
  for (const LayerState& layer : state.layers) {
    results.push_back(layer.wkv.grad());
    results.push_back(layer.att_shift_BC.grad());
  }
  return results;
}

TEST_P(Versions, RecomputationChangesNotABit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    RwkvModel model = open(dtype);
    const auto kept = run_with(model, batch_, Recompute::kNone);
    for (const Recompute recompute : {Recompute::kMixes, Recompute::kBlocks}) {
      const auto again = run_with(model, batch_, recompute);
      ASSERT_EQ(again.size(), kept.size());
      for (size_t i = 0; i < kept.size(); ++i) {
        EXPECT_TRUE(test::same_bits(again[i], kept[i])) << "result " << i;
      }
    }
  }
}

TEST_P(Versions, ShapesAreThoseOfTheModelsParameters) {
  // Sizes of which none stands in for another, where the version has a say.
  ModelConfig config{.version = GetParam().version,
                     .n_layer = 3,
                     .n_embd = 192,
                     .dim_ffn = 80,
                     .vocab_size = 77,
                     .ctx_len = 8};
  RwkvModel model(config);
  TensorShapes expected;
  for (const auto& item : model->named_parameters()) {
    expected[item.key()] = item.value().sizes().vec();
  }
  EXPECT_EQ(find_version_shapes(config.version).parameters(model->config()), expected);
  ModelConfig told = find_version_shapes(config.version).config_of(expected);
  told.ctx_len = 8;
  EXPECT_EQ(told, model->config());
}

INSTANTIATE_TEST_SUITE_P(Synthetic, Versions, testing::ValuesIn(kSynthetic), [](const auto& named) {
  return std::string(named.param.version);
});

// A file's tensors are copied a few rows at a time: here the embedding, of 9 MB, whose elements lie
// column by column in the file.
TEST(Weights, OfLargeTensorsAreThoseOfTheFile) {
  const ModelConfig config{
      .version = "rwkv7", .n_layer = 1, .n_embd = 64, .vocab_size = 35003, .ctx_len = 8};
  RwkvModel source = empty_model(config, at::kFloat);
  source->initialise(1, 1.0);
  WeightFile file;
  NamedTensors kept;
  for (const auto& item : source->named_parameters()) {
    const bool is_emb = item.key() == "emb.weight";
    const at::Tensor stored =
        is_emb ? item.value().detach().t().contiguous() : item.value().detach().contiguous();
    kept.emplace_back(item.key(), stored);
    const at::Tensor seen = is_emb ? stored.t() : stored;
    file.tensors.push_back(
        {.name = item.key(),
         .dtype = WeightDtype::kF32,
         .shape = seen.sizes().vec(),
         .strides = seen.strides().vec(),
         .storage =
             std::span(static_cast<const std::byte*>(stored.const_data_ptr()), stored.nbytes())});
  }
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    RwkvModel model = empty_model(config, dtype);
    load_weights(model, file);
    for (const auto& item : model->named_parameters()) {
      const at::Tensor& expected = *source->named_parameters().find(item.key());
      const bool exact = item.key() == "blocks.0.att.w0";
      EXPECT_EQ(item.value().scalar_type(), exact ? at::kFloat : dtype) << item.key();
      EXPECT_TRUE(
          test::same_bits(item.value().detach(), expected.detach().to(exact ? at::kFloat : dtype)))
          << item.key();
    }
  }
}

}  // namespace
}  // namespace rwkv
