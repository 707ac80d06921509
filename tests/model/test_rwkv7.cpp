#include <cmath>
#include <fstream>
#include <map>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "model/initial_values.h"
#include "model/rwkv7.h"
#include "model/rwkv_model.h"
#include "model/version_shapes.h"
#include "model/weights.h"
#include "tests/support/changed_file.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "tests/support/tiny_model.h"

namespace rwkv {
namespace {

TEST(Rwkv7Logits, MatchRwkvCppOnItsTinyModel) {
  const std::string weights =
      test::find_test_data("derived/pth_reader/tiny-rwkv-7v0-834K.bf16.pth");
  SKIP_WITHOUT(weights);
  test::expect_tiny_model(open_model(weights, at::kFloat), "7v0-834K", ' ');
}

// ---- A trained model that reverses digits -------------------------------------------------------

// Two RWKV-7 blocks put together in another way than ours, with names of their own: no ln0, a bias
// after each TimeMix and on the head. Source: BlinkDL/RWKV-LM RWKV-v8/251105_reverse_run.py.
class Reverser {
 public:
  Reverser(const std::string& path, at::ScalarType dtype)
      : tensors_(test::load_tensors(path)), dtype_(dtype) {
    for (auto& [name, tensor] : tensors_) {
      tensor = tensor.to(dtype);
    }
    ModelConfig config{.version = "rwkv7",
                       .n_layer = 2,
                       .n_embd = 32,
                       .dim_ffn = 128,
                       .head_size = 16,
                       .rank_decay = 8,
                       .rank_iclr = 8,
                       .rank_value = 8,
                       .rank_gate = 8,
                       .vocab_size = 12};
    find_version_shapes("rwkv7").resolve(config);
    for (int64_t layer = 0; layer < 2; ++layer) {
      const std::string number = std::to_string(layer + 1);
      att_.push_back(std::make_shared<Rwkv7TimeMix>(config, layer));
      ffn_.push_back(std::make_shared<Rwkv7ChannelMix>(config));
      fill(*att_.back(), "rwkv" + number + ".");
      fill(*ffn_.back(), "ffn" + number + ".");
      for (const char* norm : {"a", "b"}) {
        norms_.push_back(norm_of("ln" + number + norm));
      }
    }
    norms_.push_back(norm_of("lno"));
  }

  at::Tensor logits_of(const at::Tensor& tokens_BT) const {
    const int64_t batch_size = tokens_BT.size(0);
    const at::Tensor nothing = at::zeros({batch_size, 32}, dtype_);
    at::Tensor x = at::embedding(tensors_.at("e.weight"), tokens_BT), v_first;
    for (size_t layer = 0; layer < 2; ++layer) {
      const auto att_in = norms_[2 * layer]->shift_mix(x, {}, nothing, att_[layer]->mixes());
      const TimeMixOutput mixed =
          att_[layer]->forward({.mixed_J = att_in.mixed_J,
                                .wkv = at::zeros({batch_size, 2, 16, 16}, dtype_),
                                .v_first_BTC = v_first});
      v_first = layer == 0 ? mixed.v_first_BTC : v_first;
      x = x + mixed.y_BTC + tensors_.at("rosa" + std::to_string(layer + 1) + ".o.bias");
      const auto ffn_in = norms_[2 * layer + 1]->shift_mix(x, {}, nothing, ffn_[layer]->mixes());
      x = ffn_[layer]->forward(x, ffn_in.mixed_J);
    }
    return at::linear(norms_.back()->forward(x), tensors_.at("o.weight"), tensors_.at("o.bias"));
  }

 private:
  void fill(torch::nn::Module& module, const std::string& prefix) {
    for (auto& item : module.named_parameters()) {
      const auto found = tensors_.find(prefix + item.key());
      if (found != tensors_.end()) {
        item.value().set_data(found->second.view_as(item.value()));
      } else {
        // The file's first block has no v0, which nothing reads.
        EXPECT_EQ(prefix + item.key(), "rwkv1.v0");
      }
    }
  }
  LayerNorm norm_of(const std::string& name) {
    LayerNorm norm(32);
    fill(*norm, name + ".");
    return norm;
  }

  std::map<std::string, at::Tensor> tensors_;
  at::ScalarType dtype_;
  std::vector<std::shared_ptr<Rwkv7TimeMix>> att_;
  std::vector<std::shared_ptr<Rwkv7ChannelMix>> ffn_;
  std::vector<LayerNorm> norms_;
};

class Rwkv7Reverser : public testing::Test {
 protected:
  void SetUp() override {
    path_ = test::find_test_data("rwkv_lm_pth/260123_reverse_L2_only_rwkv7.pth");
    SKIP_WITHOUT(path_);
  }
  at::NoGradGuard no_grad_;
  std::string path_;
};

TEST_F(Rwkv7Reverser, HasItsLogits) {
  const std::string path = test::find_test_data("derived/rwkv7_reverse/golden.json");
  std::ifstream file(path);
  const Reverser exact(path_, at::kDouble), single(path_, at::kFloat);
  for (const auto& prompt : nlohmann::json::parse(file)) {
    const auto ids = prompt.at("ids").get<std::vector<int64_t>>();
    const auto logits = prompt.at("logits").get<std::vector<std::vector<double>>>();
    const at::Tensor tokens_1T = at::tensor(ids, at::kLong).unsqueeze(0);
    const at::Tensor in_fp64 = exact.logits_of(tokens_1T)[0];
    const at::Tensor in_fp32 = single.logits_of(tokens_1T)[0];
    for (size_t t = 0; t < logits.size(); ++t) {
      const at::Tensor expected = at::tensor(logits[t], at::kDouble);
      const auto at = static_cast<int64_t>(t);
      // The file has ten digits; sixty digits remembered cost fp32 some.
      EXPECT_TRUE(test::close_max(in_fp64[at], expected, 1e-8)) << prompt.at("prompt") << " " << t;
      EXPECT_TRUE(test::close_max(in_fp32[at], expected, 2e-4)) << prompt.at("prompt") << " " << t;
    }
  }
}

TEST_F(Rwkv7Reverser, ReversesNumbersOfUpToSixtyDigits) {
  // Digits, a comma, the digits backwards, then # to the length of 129. Any digits will do.
  constexpr int64_t kComma = 10, kEnd = 11;
  std::vector<std::vector<int64_t>> rows;
  uint32_t seed = 1;
  for (int64_t digits = 1; digits <= 60; ++digits) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      std::vector<int64_t> row;
      for (int64_t i = 0; i < digits; ++i) {
        seed = seed * 1664525 + 1013904223;
        row.push_back((seed >> 16) % 10);
      }
      std::vector<int64_t> backwards(row.rbegin(), row.rend());
      row.push_back(kComma);
      row.insert(row.end(), backwards.begin(), backwards.end());
      row.resize(129, kEnd);
      rows.push_back(row);
    }
  }
  const auto count = static_cast<int64_t>(rows.size());
  at::Tensor tokens = at::empty({count, 129}, at::kLong);
  for (int64_t row = 0; row < count; ++row) {
    tokens[row] = at::tensor(rows[static_cast<size_t>(row)], at::kLong);
  }
  const at::Tensor told = Reverser(path_, at::kFloat).logits_of(tokens.slice(1, 0, 128)).argmax(2);
  int64_t right = 0, all = 0;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t digits = row / 3 + 1;
    // From the comma on: the digits backwards and the first #.
    const at::Tensor matches = told[row].slice(0, digits, 2 * digits + 1) ==
                               tokens[row].slice(0, digits + 1, 2 * digits + 2);
    right += matches.sum().item<int64_t>();
    all += digits + 1;
  }
  EXPECT_EQ(right, all);
}

// ---- Initial values -----------------------------------------------------------------------------

at::Tensor parameter(RwkvModel model, const std::string& name) {
  return model->named_parameters()[name].detach();
}

TEST(Rwkv7Init, FollowsTheAuthorsTable) {
  RwkvModel model(ModelConfig{
      .version = "rwkv7", .n_layer = 3, .n_embd = 10, .head_size = 5, .vocab_size = 11});
  model->initialise(1, 1e-3);
  // By hand from the table: layer 1 of 3 has r01 = 1/2, r10 = 2/3; channel 6 of 10 has d = 0.6,
  // span 6/9, and is the second of five in its head: m = -1/2, zigzag -1/4.
  const double r10 = 2.0 / 3, span = 6.0 / 9, zigzag = -0.25;
  const std::map<std::string, double> expected{
      {"att.x_r", 1 - std::pow(0.6, 0.2 * r10)},
      {"att.x_g", 1 - std::pow(0.6, 0.2 * r10)},
      {"att.x_w", 1 - std::pow(0.6, 0.9 * r10)},
      {"att.x_a", 1 - std::pow(0.6, 0.9 * r10)},
      {"att.x_k", 1 - std::pow(0.6, 0.7 * r10)},
      {"att.x_v", 1 - std::pow(0.6, 0.7 * r10)},
      {"ffn.x_k", 1 - std::pow(0.6, std::pow(r10, 4))},
      {"att.w0", -5.5 + 6 * std::pow(span, 1 + std::pow(0.5, 0.3)) + 2.5 * zigzag},
      {"att.a0", -0.19 + 0.3 * zigzag + 0.4 * (span - 0.5)},
      {"att.v0", 0.73 - 0.4 * (span - 0.5)},
      {"att.k_k", 0.71 - 0.1 * (span - 0.5)},
      {"att.k_a", 1.02},
      {"att.r_k", -0.04},
      {"att.ln_x.weight", std::pow(r10, 0.7)},
      {"att.ln_x.bias", 0},
      {"ln1.weight", 1},
      {"ln2.bias", 0}};
  for (const auto& [name, value] : expected) {
    EXPECT_NEAR(parameter(model, "blocks.1." + name).flatten()[6].item<double>(), value, 1e-6)
        << name;
  }
  for (const char* name : {"w1", "a1", "v1", "g1", "output.weight"}) {
    EXPECT_EQ(parameter(model, "blocks.2.att." + std::string(name)).abs().max().item<float>(), 0);
  }
  EXPECT_EQ(parameter(model, "blocks.2.ffn.value.weight").abs().max().item<float>(), 0);
  EXPECT_LE(parameter(model, "emb.weight").abs().max().item<float>(), 1e-4f);
}

// W^T W (or W W^T, the smaller) must be gain^2 times the identity.
void expect_orthogonal(const at::Tensor& weight, double gain) {
  const at::Tensor w = weight.to(at::kDouble);
  const at::Tensor product = w.size(0) >= w.size(1) ? w.t().matmul(w) : w.matmul(w.t());
  EXPECT_TRUE(test::close_max(product, at::eye(product.size(0), at::kDouble) * gain * gain, 1e-5));
}

TEST(Rwkv7Init, MakesMatricesOrthogonalWithTheirGains) {
  RwkvModel model(ModelConfig{.version = "rwkv7",
                              .n_layer = 2,
                              .n_embd = 24,
                              .head_size = 8,
                              .rank_decay = 40,
                              .vocab_size = 200});
  model->initialise(3, 1e-3);
  expect_orthogonal(parameter(model, "head.weight"), 0.5 * std::sqrt(200.0 / 24));
  expect_orthogonal(parameter(model, "blocks.1.att.receptance.weight"), 1);
  expect_orthogonal(parameter(model, "blocks.1.att.value.weight"), 1);
  expect_orthogonal(parameter(model, "blocks.1.att.key.weight"), 0.1);
  expect_orthogonal(parameter(model, "blocks.1.ffn.key.weight"), 1);
  expect_orthogonal(parameter(model, "blocks.1.att.w2"), 0.1 * std::sqrt(40.0 / 24));
  expect_orthogonal(parameter(model, "blocks.1.att.g2"), 0.1 * std::sqrt(32.0 / 24));
}

TEST(Rwkv7Init, HasTheAuthorsRanksAndCounts) {
  struct Size {
    int64_t n_layer, n_embd, rank_decay, rank_value, rank_gate;
  };
  // train_temp's, at other widths than its own 64 channels a head would give no other.
  for (const Size& size : {Size{12, 768, 64, 32, 128}, Size{24, 2048, 128, 64, 224}}) {
    ModelConfig config{
        .version = "rwkv7", .n_layer = size.n_layer, .n_embd = size.n_embd, .vocab_size = 65536};
    find_version_shapes("rwkv7").resolve(config);
    EXPECT_EQ(config.rank_decay, size.rank_decay);
    EXPECT_EQ(config.rank_iclr, size.rank_decay);
    EXPECT_EQ(config.rank_value, size.rank_value);
    EXPECT_EQ(config.rank_gate, size.rank_gate);
    int64_t count = 0;
    for (const auto& [name, shape] : find_version_shapes("rwkv7").parameters(config)) {
      count += num_elements(shape);
    }
    const int64_t C = size.n_embd;
    EXPECT_EQ(
        count,
        2 * 65536 * C + 4 * C +
            size.n_layer * (19 * C + 12 * C * C +
                            2 * C * (2 * size.rank_decay + size.rank_value + size.rank_gate)));
    if (C == 768) {
      EXPECT_EQ(count, 191'084'544);
    }
  }
}

TEST(Rwkv7Traits, AreTheAuthorsClasses) {
  RwkvModel model(ModelConfig{.version = "rwkv7", .n_layer = 2, .n_embd = 64, .vocab_size = 11});
  for (const auto& item : model->named_parameters()) {
    const std::string& name = item.key();
    const ParameterTraits traits = model->traits(name, item.value().sizes());
    const bool is_w0 = name.ends_with("att.w0");
    EXPECT_EQ(traits.lr_scale, is_w0 ? 2 : 1) << name;
    EXPECT_EQ(traits.keep_fp32, is_w0) << name;
    const bool is_matrix =
        name == "emb.weight" || name == "head.weight" ||
        matches_any({"*.receptance.weight", "*.key.weight", "*.value.weight", "*.output.weight"},
                    name);
    EXPECT_EQ(traits.weight_decay, is_matrix) << name;
  }
}

// The author's: a fresh model's blocks add nothing, so that of its parameters few have a gradient.
TEST(Rwkv7Fresh, HasGradientsWhereTheMathsHasThemAndNoneElsewhere) {
  RwkvModel model(ModelConfig{.version = "rwkv7", .n_layer = 2, .n_embd = 64, .vocab_size = 11});
  model->initialise(3, 1e-3);
  const at::Tensor tokens = at::arange(20).view({2, 10}).remainder(11);
  model->loss(tokens, tokens.flip(1), model->initial_state(2), 0).loss.backward();
  for (const auto& item : model->named_parameters()) {
    const at::Tensor& gradient = item.value().grad();
    const double largest = gradient.defined() ? gradient.abs().max().item<double>() : 0;
    const bool has_one = matches_any({"*.att.output.weight",
                                      "*.ffn.value.weight",
                                      "emb.weight",
                                      "blocks.0.ln0.*",
                                      "ln_out.*",
                                      "head.weight"},
                                     item.key());
    EXPECT_EQ(largest > 0, has_one) << item.key() << " " << largest;
  }
}

// ---- What does not fit --------------------------------------------------------------------------

TEST(Rwkv7Config, RefusesWhatIsNotItsOwn) {
  const auto text = [](ModelConfig config) {
    config.version = "rwkv7";
    return THROWN_TEXT(std::invalid_argument, find_version_shapes("rwkv7").resolve(config));
  };
  EXPECT_EQ(text({.n_embd = 96}), "model.n_embd = 96: must be a multiple of model.head_size, 64");
  EXPECT_EQ(text({.n_embd = 64, .dim_att = 128}),
            "model.dim_att = 128: rwkv7 has n_embd = 64; leave the key out");
}

class Rwkv7File : public test::ChangedFile {
 protected:
  Rwkv7File() : ChangedFile("derived/rwkv567_synthetic/v7_weights_fp32.pth") {}
};

TEST_F(Rwkv7File, OfTwoVersionsNamesTheTensor) {
  tensors_["blocks.1.att.time_mix_k"] = at::zeros({1, 1, 32});
  EXPECT_THAT(error(),
              testing::HasSubstr("blocks.1.att.time_mix_k is unexpected in a model of version "
                                 "rwkv7 with 3 layers"));
}
TEST_F(Rwkv7File, WithoutATensorNamesIt) {
  tensors_.erase("blocks.2.att.a2");
  EXPECT_THAT(error(), testing::HasSubstr("blocks.2.att.a2 is missing"));
}
TEST_F(Rwkv7File, WithOddRanksNamesTheFactor) {
  tensors_["blocks.2.att.g1"] = at::zeros({32, 9});
  EXPECT_THAT(error(), testing::HasSubstr("blocks.2.att.g1 is [32, 9], expected [32, 8]"));
}
TEST_F(Rwkv7File, WithHeadsThatDoNotDivideSaysSo) {
  tensors_["blocks.0.att.r_k"] = at::zeros({2, 15});
  EXPECT_THAT(error(), testing::HasSubstr("heads of 15 channels, expected a divisor of the 32"));
}

}  // namespace
}  // namespace rwkv
