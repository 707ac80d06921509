#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "tests/support/optimizer_state.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "train/checkpoint.h"
#include "train/checkpoint_saver.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

const ModelConfig kModel{
    .n_layer = 2, .n_embd = 24, .dim_att = 32, .dim_ffn = 40, .vocab_size = 30, .ctx_len = 16};

CheckpointSettings settings_for(const test::TempFolder& folder) {
  CheckpointSettings settings;
  settings.config.model = kModel;
  settings.config.data.train = "corpus";
  settings.config.train.run_dir = folder.path("run");
  settings.config.train.batch_size = 4;
  settings.config.train.total_steps = 12;
  settings.tokenizer_identity = "bytes";
  return settings;
}

TrainerState state_after(const CheckpointSettings& settings, int64_t step) {
  return {.step = step,
          .samples = step * settings.config.batch_sequences(),
          .tokens = step * settings.config.tokens_per_step(),
          .corpus = "a corpus",
          .elapsed_s = 1.5};
}

// A model after two steps: its moments are not zero.
struct Trained {
  explicit Trained(uint64_t seed) : model(kModel) {
    model->initialise(seed, 1e-2);
    optimizer = std::make_unique<Optimizer>(model, OptimizerConfig{}, at::kFloat);
    at::manual_seed(seed);
    for (int step = 0; step < 2; ++step) {
      optimizer->zero_gradient();
      for (auto& parameter : model->parameters()) {
        parameter.mutable_grad() = at::randn_like(parameter);
      }
      optimizer->accumulate_gradient();
      optimizer->set_lr(1e-2);
      optimizer->update(at::scalar_tensor(1.0));
    }
  }
  RwkvModel model;
  std::unique_ptr<Optimizer> optimizer;
};

// What one of W processes holds, if each kind of tensor lies in a row and is cut into W shares.
std::vector<TensorPiece> share_of(const std::vector<TensorPiece>& whole, ProcessPlace place) {
  int64_t total = 0;
  for (const TensorPiece& piece : whole) {
    total += piece.end;
  }
  const int64_t first = total * place.rank / place.num_processes;
  const int64_t last = total * (place.rank + 1) / place.num_processes;
  std::vector<TensorPiece> share;
  int64_t offset = 0;
  for (const TensorPiece& piece : whole) {
    const int64_t begin = std::clamp<int64_t>(first - offset, 0, piece.end);
    const int64_t end = std::clamp<int64_t>(last - offset, 0, piece.end);
    share.push_back({.name = piece.name,
                     .shape = piece.shape,
                     .begin = begin,
                     .end = end,
                     .values = piece.values.slice(0, begin, end)});
    offset += piece.end;
  }
  return share;
}

std::string save_as(const CheckpointSettings& settings,
                    const Optimizer& optimizer,
                    const TrainerState& state,
                    int64_t num_processes) {
  CheckpointPieces whole;
  optimizer.copy_state(whole);
  begin_checkpoint(settings, state.step, bytes_of(whole));
  std::vector<ManifestFile> files;
  for (int64_t rank = 0; rank < num_processes; ++rank) {
    const ProcessPlace place{.rank = rank, .num_processes = num_processes};
    const CheckpointPieces pieces{.weights = share_of(whole.weights, place),
                                  .moments = share_of(whole.moments, place)};
    const auto written = write_checkpoint_pieces(settings, state.step, pieces, place);
    files.insert(files.end(), written.begin(), written.end());
  }
  return finish_checkpoint(settings, state, std::move(files), num_processes);
}

void expect_same_state(const Optimizer& actual, const Optimizer& expected) {
  CheckpointPieces a, b;
  actual.copy_state(a);
  expected.copy_state(b);
  for (const auto& [x, y] : {std::pair{&a.weights, &b.weights}, {&a.moments, &b.moments}}) {
    ASSERT_EQ(x->size(), y->size());
    for (size_t i = 0; i < x->size(); ++i) {
      EXPECT_TRUE(test::same_bits((*x)[i].values, (*y)[i].values)) << (*x)[i].name;
    }
  }
}

// Flips one bit in the middle of a file.
void flip_bit(const std::string& path) {
  std::string content = test::read_file(path);
  content[content.size() / 2] ^= 4;
  test::write_file(path, content);
}

TEST(Checkpoint, IsTheSameWhateverTheNumberOfProcessesThatWroteIt) {
  const Trained trained(1);
  for (const int64_t num_processes : {1, 2, 3, 7}) {
    const test::TempFolder folder;
    const CheckpointSettings settings = settings_for(folder);
    const TrainerState state = state_after(settings, 2);
    const std::string path = save_as(settings, *trained.optimizer, state, num_processes);
    EXPECT_EQ(find_damage(path, Scrutiny::kContents), "");
    EXPECT_EQ(read_manifest(path).processes, num_processes);
    EXPECT_EQ(read_manifest(path).files.size(), static_cast<size_t>(2 * num_processes + 2));
    EXPECT_EQ(read_saved_run(path).state.samples, state.samples);

    const Trained other(2);
    load_optimizer(path, state, *other.optimizer);
    expect_same_state(*other.optimizer, *trained.optimizer);
    // And a model to whatever reads weights.
    const WeightFile file = read_weights(path);
    EXPECT_EQ(config_of(file).n_embd, kModel.n_embd);
    EXPECT_EQ(config_in(file), settings.config);
    EXPECT_EQ(tokenizer_identity_in(file), "bytes");
    for (const auto& [name, weight] : test::master_weights(*trained.optimizer)) {
      EXPECT_TRUE(test::same_bits(to_tensor(*file.find(name)), weight)) << name;
    }
  }
}

TEST(Checkpoint, OfOneProcessHasTheFilesThatOthersRead) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  CheckpointPieces pieces;
  Trained(1).optimizer->copy_state(pieces);
  const std::string path = save_checkpoint(settings, pieces, state_after(settings, 2));
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    names.push_back(entry.path().filename().string());
  }
  EXPECT_THAT(names,
              testing::UnorderedElementsAre("config.toml",
                                            "manifest.json",
                                            "model.safetensors",
                                            "optimizer.safetensors",
                                            "trainer.json"));
}

TEST(Checkpoint, ThatIsAbandonedLeavesNothing) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  begin_checkpoint(settings, 3, 1000);
  EXPECT_TRUE(std::filesystem::exists(folder.path("run/checkpoints/partial_step_00000003")));
  abandon_checkpoint(settings, 3);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path("run/checkpoints")));
}

TEST(Checkpoint, IsNeverOfWeightsThatAreNotFinite) {
  const Trained trained(1);
  for (const float wrong : {NAN, INFINITY, -INFINITY}) {
    const test::TempFolder folder;
    const CheckpointSettings settings = settings_for(folder);
    CheckpointPieces pieces;
    trained.optimizer->copy_state(pieces);
    pieces.weights[3].values[-1] = wrong;
    const TrainerState state = state_after(settings, 2);
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, save_checkpoint(settings, pieces, state)),
                AllOf(HasSubstr("step 2: its update left " + pieces.weights[3].name +
                                " not finite, so it is not saved"),
                      HasSubstr("There is no checkpoint yet")));
    EXPECT_TRUE(std::filesystem::is_empty(folder.path("run/checkpoints")));
  }
}

TEST(Checkpoint, NeedsRoomOnTheDisk) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  const uint64_t free_bytes = std::filesystem::space(folder.path()).available;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, begin_checkpoint(settings, 3, free_bytes)),
              AllOf(HasSubstr("run/checkpoints: "),
                    HasSubstr(" bytes free, a checkpoint takes "),
                    HasSubstr("free some, or lower train.keep_checkpoints")));
}

class Damage : public testing::Test {
 protected:
  Damage() : settings(settings_for(folder)) { settings.retention.newest = 3; }
  std::string save(int64_t step, int64_t num_processes) {
    return save_as(settings, *trained.optimizer, state_after(settings, step), num_processes);
  }
  WholeCheckpoint newest(Scrutiny scrutiny = Scrutiny::kContents) const {
    return newest_whole_checkpoint(folder.path("run"), scrutiny);
  }

  test::TempFolder folder;
  CheckpointSettings settings;
  Trained trained{1};
};

TEST_F(Damage, IsFoundInEveryFile) {
  const std::string older = save(1, 2);
  const std::string path = save(2, 2);
  EXPECT_EQ(newest().path, path);
  for (const ManifestFile& file : read_manifest(path).files) {
    const std::string name = path + "/" + file.name;
    const std::string content = test::read_file(name);
    flip_bit(name);
    EXPECT_THAT(find_damage(path, Scrutiny::kContents),
                AllOf(HasSubstr(file.name + ": checksum "), HasSubstr(file.checksum)));
    EXPECT_EQ(newest().path, older) << file.name;
    EXPECT_THAT(newest().refused, ElementsAre(HasSubstr(file.name)));
    test::write_file(name, content.substr(1));
    EXPECT_THAT(find_damage(path, Scrutiny::kSizes),
                AllOf(HasSubstr(file.name + ": "), HasSubstr("cut short")));
    std::filesystem::remove(name);
    EXPECT_THAT(find_damage(path, Scrutiny::kSizes), HasSubstr(file.name + ": is missing"));
    EXPECT_EQ(newest(Scrutiny::kSizes).path, older) << file.name;
    test::write_file(name, content);
  }
  EXPECT_EQ(newest().path, path);
}

TEST_F(Damage, OfTheNewestIsToldToWhoReadsTheRunsModel) {
  const std::string oldest = save(1, 2);
  const std::string older = save(2, 2);
  const std::string path = save(3, 2);
  EXPECT_EQ(find_model(folder.path("run")), path);
  const std::string name = path + "/model.00001-of-00002.safetensors";
  test::write_file(name, test::read_file(name).substr(1));
  const auto thrown = [&] {
    return THROWN_TEXT(std::runtime_error, find_model(folder.path("run")));
  };
  EXPECT_THAT(thrown(),
              AllOf(HasSubstr(name),
                    HasSubstr("cut short"),
                    HasSubstr("name an older checkpoint, the newest whole one is " + older)));
  EXPECT_EQ(THROWN_TEXT(std::runtime_error, require_whole_model(path)), thrown());
  flip_bit(older + "/model.00000-of-00002.safetensors");
  EXPECT_THAT(thrown(), HasSubstr("the newest whole one is " + oldest));
  std::filesystem::remove_all(oldest);
  EXPECT_THAT(thrown(), HasSubstr("no older checkpoint is whole beside it"));
}

TEST_F(Damage, OfTheManifestIsFound) {
  const std::string older = save(1, 1);
  const std::string path = save(2, 1);
  const std::string name = path + "/manifest.json";
  const std::string content = test::read_file(name);
  for (const std::string& wrong : {content.substr(0, content.size() / 2),
                                   std::string("{}"),
                                   std::string(R"({"step": 2, "processes": 1, "rookery": "", )"
                                               R"("files": [{"name": "../a", "bytes": 1, )"
                                               R"("xxh3_128": ""}]})"),
                                   std::string(R"({"step": 2, "processes": 1, "rookery": "", )"
                                               R"("files": []})"),
                                   // Of another save.
                                   test::read_file(older + "/manifest.json")}) {
    test::write_file(name, wrong);
    EXPECT_NE(find_damage(path, Scrutiny::kSizes), "") << wrong;
    EXPECT_EQ(newest().path, older);
  }
  std::filesystem::remove(name);
  EXPECT_THAT(find_damage(path, Scrutiny::kSizes), HasSubstr("manifest.json: is missing"));
}

TEST_F(Damage, OfAllCheckpointsIsAnError) {
  EXPECT_EQ(newest().path, std::nullopt);
  flip_bit(save(1, 1) + "/model.safetensors");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, newest()),
              AllOf(HasSubstr("step_00000001/model.safetensors: checksum"),
                    HasSubstr("there is no other checkpoint in ")));
  flip_bit(save(2, 1) + "/optimizer.safetensors");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, newest()),
              AllOf(HasSubstr("step_00000002/optimizer.safetensors: checksum"),
                    HasSubstr("none of the 2 checkpoints is whole")));
}

TEST_F(Damage, IsNotSoughtWhereTheProgramWroteNoManifestYet) {
  const std::string path = save(2, 1);
  std::filesystem::remove(path + "/manifest.json");
  test::write_file(path + "/trainer.json",
                   R"({"step": 2, "samples": 8, "tokens": 128, "corpus": "", "elapsed_s": 1})");
  EXPECT_EQ(newest().path, path);
  std::filesystem::remove(path + "/optimizer.safetensors");
  EXPECT_THAT(find_damage(path, Scrutiny::kSizes), HasSubstr("optimizer.safetensors: is missing"));
}

TEST_F(Damage, DoesNotCountAsACheckpointThatIsKept) {
  settings.retention.newest = 2;
  save(1, 1);
  std::filesystem::remove(save(2, 1) + "/optimizer.safetensors");
  save(3, 1);
  // With the damaged one counted, step 1 would go.
  EXPECT_TRUE(std::filesystem::exists(folder.path("run/checkpoints/step_00000001")));
  save(4, 1);
  EXPECT_FALSE(std::filesystem::exists(folder.path("run/checkpoints/step_00000001")));
  EXPECT_FALSE(std::filesystem::exists(folder.path("run/checkpoints/step_00000002")));
}

TEST(CheckpointSaver, SavesWhatWasThereWhenItBegan) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  Trained trained(1);
  const TrainerState state = state_after(settings, 2);
  CheckpointSaver saver(settings);
  EXPECT_EQ(saver.wait(), std::nullopt);
  saver.start(*trained.optimizer, state);
  // The next step.
  saver.wait_for_copy();
  trained.optimizer->update(at::scalar_tensor(1.0));
  const auto saved = saver.wait();
  ASSERT_TRUE(saved.has_value());
  EXPECT_EQ(saver.take_saved(), std::nullopt);
  const Trained expected(1);
  const Trained other(2);
  load_optimizer(saved->path, state, *other.optimizer);
  expect_same_state(*other.optimizer, *expected.optimizer);
}

TEST(CheckpointSaver, TellsHowLongASaveTookAndWasWaitedFor) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  const Trained trained(1);
  CheckpointSaver saver(settings);
  saver.start(*trained.optimizer, state_after(settings, 1));
  const auto waited_for = saver.wait();
  EXPECT_GT(waited_for->save_s, 0);
  EXPECT_GT(waited_for->wait_s, 0.5 * waited_for->save_s);
  saver.start(*trained.optimizer, state_after(settings, 2));
  std::optional<SavedCheckpoint> in_the_background;
  while (!in_the_background) {
    in_the_background = saver.take_saved();
  }
  EXPECT_LT(in_the_background->wait_s, 0.5 * in_the_background->save_s);
  EXPECT_EQ(describe({.path = "run/step_1", .save_s = 1.239, .wait_s = 0.0123}),
            "saved run/step_1 in 1.24 s (training waited 0.01 s)");
}

TEST(CheckpointSaver, HandsOnWhatItFailedWith) {
  const test::TempFolder folder;
  const CheckpointSettings settings = settings_for(folder);
  const Trained trained(1);
  CheckpointSaver saver(settings);
  test::write_file(folder.path("run"), "in the way");
  saver.start(*trained.optimizer, state_after(settings, 2));
  EXPECT_THAT(THROWN_TEXT(std::filesystem::filesystem_error, saver.settle()),
              HasSubstr("run/checkpoints"));
  std::filesystem::remove(folder.path("run"));
  saver.start(*trained.optimizer, state_after(settings, 3));
  saver.settle();
  EXPECT_TRUE(saver.wait().has_value());
  EXPECT_FALSE(saver.wait().has_value());
}

}  // namespace
}  // namespace rwkv
