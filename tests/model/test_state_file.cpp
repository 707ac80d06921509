#include <cstdlib>
#include <filesystem>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "model/state_file.h"
#include "model/weights.h"
#include "tests/support/tensors.h"
#include "tests/support/tiny_model.h"

namespace rwkv {
namespace {

using test::random_model;
using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

at::Tensor random_tokens(int64_t batch_size, int64_t seq_len) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(uint64_t{5});
  return at::randint(48, {batch_size, seq_len}, generator, at::kLong);
}

void expect_same_state(const State& actual, const State& expected) {
  ASSERT_EQ(actual.layers.size(), expected.layers.size());
  for (size_t layer = 0; layer < actual.layers.size(); ++layer) {
    const LayerState &x = actual.layers[layer], &y = expected.layers[layer];
    EXPECT_TRUE(test::same_bits(x.att_shift_BC, y.att_shift_BC)) << layer;
    EXPECT_TRUE(test::same_bits(x.ffn_shift_BC, y.ffn_shift_BC)) << layer;
    EXPECT_TRUE(test::same_bits(x.wkv, y.wkv)) << layer;
  }
}

class StateFile : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "state_XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }
  std::string file(const std::string& name) const { return (folder_ / name).string(); }
  std::string saved(RwkvModel model, const std::string& name = "s.safetensors") const {
    const at::NoGradGuard no_grad;
    save_state(
        file(name), model->forward(random_tokens(1, 5), model->initial_state(1)).state, model);
    return file(name);
  }

  std::filesystem::path folder_;
};

TEST_P(StateFile, SecondHalfFromAFileHasTheBitsOfOneRun) {
  const at::NoGradGuard no_grad;
  RwkvModel model = random_model(GetParam());
  const at::Tensor tokens = random_tokens(1, 24);
  // Token by token, as text is written: then nothing but the file stands between the halves.
  State state = model->initial_state(1);
  at::Tensor whole;
  for (int64_t t = 0; t < 24; ++t) {
    auto output = model->forward_last(tokens.slice(1, t, t + 1), state);
    whole = output.logits_BV;
    state = std::move(output.state);
    if (t == 11) {
      save_state(file("s.safetensors"), state, model);
    }
  }
  RwkvModel other = random_model(GetParam());
  other->set_initial_state(load_state(file("s.safetensors"), other));
  State second = other->initial_state(1);
  at::Tensor continued;
  for (int64_t t = 12; t < 24; ++t) {
    auto output = other->forward_last(tokens.slice(1, t, t + 1), second);
    continued = output.logits_BV;
    second = std::move(output.state);
  }
  EXPECT_TRUE(test::same_bits(continued, whole));
  expect_same_state(second, state);
  // And of every row of a batch.
  const at::Tensor rest = tokens.slice(1, 12, 24);
  const at::Tensor one = other->forward(rest, other->initial_state(1)).logits_BTV;
  const at::Tensor three = other->forward(rest.repeat({3, 1}), other->initial_state(3)).logits_BTV;
  EXPECT_TRUE(test::close_max(three, one.repeat({3, 1, 1}), 1e-5));
  EXPECT_TRUE(test::close_max(one.slice(1, 11).squeeze(1), whole, 1e-4));
  // A model that has read nothing says something else.
  EXPECT_GT(
      (model->forward(rest, model->initial_state(1)).logits_BTV - one).abs().max().item<float>(),
      1e-2);
}

TEST_P(StateFile, Bf16StateIsExactToo) {
  const at::NoGradGuard no_grad;
  RwkvModel model = random_model(GetParam());
  model->set_dtype(at::kBFloat16);
  const State state = model->forward(random_tokens(1, 5), model->initial_state(1)).state;
  for (const char* name : {"s.safetensors", "s.bin"}) {
    save_state(file(name), state, model);
    model->set_initial_state(load_state(file(name), model));
    expect_same_state(model->initial_state(1), state);
  }
}

TEST_P(StateFile, StartIsAConstantInTraining) {
  RwkvModel model = random_model(GetParam());
  const at::Tensor tokens = random_tokens(2, 9);
  const auto loss = [&] {
    return model->loss(tokens.slice(1, 0, 8), tokens.slice(1, 1, 9), model->initial_state(2), 0)
        .loss;
  };
  const double from_nothing = loss().item<double>();
  model->set_initial_state(load_state(saved(model), model));
  const at::Tensor from_state = loss();
  EXPECT_GT(std::abs(from_state.item<double>() - from_nothing), 1e-4);
  from_state.backward();
  expect_same_state(model->initial_state(1), load_state(file("s.safetensors"), model));
}

TEST_P(StateFile, RefusesOtherModelsStates) {
  const std::string version = GetParam();
  const std::string path = saved(random_model(version));
  const std::string other = version == "rwkv7" ? "rwkv6" : "rwkv7";
  EXPECT_THAT([&] { load_state(path, random_model(other)); },
              ThrowsMessage<std::runtime_error>(
                  HasSubstr(path + ": is a state of \"" + version +
                            "\", expected one of the model's version, \"" + other + "\"")));
  EXPECT_THAT([&] { load_state(path, random_model(version, 3)); },
              ThrowsMessage<std::runtime_error>(HasSubstr(
                  path + ": holds 6 tensors of a state, expected 9 for the model's n_layer = 3")));
  EXPECT_THAT([&] { load_state(path, random_model(version, 2, 32)); },
              ThrowsMessage<std::runtime_error>(
                  AllOf(HasSubstr(path + ": blocks.0.att.shift is [16], expected [32]"),
                        HasSubstr("n_embd = 32"))));
}

INSTANTIATE_TEST_SUITE_P(Of,
                         StateFile,
                         testing::Values("rwkv4", "rwkv5", "rwkv6", "rwkv7"),
                         [](const auto& test) { return std::string(test.param); });

using StateFiles = StateFile;

TEST_F(StateFiles, TimeStateIsValueByKey) {
  RwkvModel model = random_model("rwkv7", 1);
  at::Tensor theirs = at::randn({2, 8, 8});
  write_weights(file("t.pth"), to_write({{"blocks.0.att.time_state", theirs}}), {});
  const State state = load_state(file("t.pth"), model);
  // Read with one token of receptance e_j, a state gives its column of the key j.
  EXPECT_TRUE(test::same_bits(state.layers[0].wkv[0], theirs.transpose(1, 2).contiguous()));
  EXPECT_EQ(state.layers[0].att_shift_BC.abs().max().item<float>(), 0);
  EXPECT_THAT([&] { load_state(file("t.pth"), random_model("rwkv7", 2)); },
              ThrowsMessage<std::runtime_error>(
                  HasSubstr("holds 1 tensors of a state, expected 2 for the model's n_layer = 2")));
  EXPECT_THAT([&] { load_state(file("t.pth"), random_model("rwkv7", 1, 32)); },
              ThrowsMessage<std::runtime_error>(
                  HasSubstr("blocks.0.att.time_state is [2, 8, 8], expected [4, 8, 8]")));
  EXPECT_THAT([&] { load_state(file("t.pth"), random_model("rwkv4", 1)); },
              ThrowsMessage<std::runtime_error>(HasSubstr("but rwkv4 has no heads")));
}

TEST_F(StateFiles, RefusesWhatIsNone) {
  RwkvModel model = random_model("rwkv7");
  const auto write = [&](const at::Tensor& tensor, const std::string& name) {
    write_weights(file("x.pth"), to_write({{name, tensor}}), {});
    return [&] { load_state(file("x.pth"), model); };
  };
  EXPECT_THAT(write(at::zeros({4}), "emb.weight"),
              ThrowsMessage<std::runtime_error>(HasSubstr("x.pth: holds no state")));
  EXPECT_THAT(write(at::zeros({4}), "blocks.0.att.wkv"),
              ThrowsMessage<std::runtime_error>(HasSubstr("does not say of which version")));
  EXPECT_THAT([&] { load_state(file("none.pth"), model); },
              ThrowsMessage<std::runtime_error>(HasSubstr("none.pth")));
  RwkvModel one = random_model("rwkv7", 1);
  for (const auto& [tensor, text] :
       {std::pair(at::full({2, 8, 8}, NAN), "has values that are not finite"),
        std::pair(at::zeros({2, 8, 8}, at::kInt), "has elements of type i32")}) {
    write(tensor, "blocks.0.att.time_state");
    EXPECT_THAT([&] { load_state(file("x.pth"), one); },
                ThrowsMessage<std::runtime_error>(HasSubstr(text)));
  }
}

TEST_F(StateFiles, WritesNothingThatCannotBeReadBack) {
  RwkvModel model = random_model("rwkv7");
  State state = model->initial_state(1);
  EXPECT_THAT([&] { save_state(file("s.pth"), state, model); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("name a .safetensors")));
  EXPECT_THAT([&] { save_state(file("s.gguf"), state, model); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("names no weight format")));
  state.layers[1].wkv.fill_(INFINITY);
  EXPECT_THAT([&] { save_state(file("s.st"), state, model); },
              ThrowsMessage<std::runtime_error>(
                  HasSubstr("blocks.1.att.wkv of the state has values that are not finite")));
  EXPECT_TRUE(std::filesystem::is_empty(folder_));
}

}  // namespace
}  // namespace rwkv
