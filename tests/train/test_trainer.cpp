#include <filesystem>
#include <sstream>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "model/formats/format_registry.h"
#include "tests/support/tensors.h"
#include "tests/support/test_data.h"
#include "train/evaluate.h"
#include "train/run_setup.h"
#include "train/trainer.h"

namespace rwkv {
namespace {

using testing::HasSubstr;

constexpr int64_t kVocab = 30;

// Sequences in which each token follows from the one before, with a little noise: something to
// learn.
std::string make_corpus(const test::TempFolder& folder,
                        const std::string& name,
                        int64_t tokens,
                        const std::string& identity = "bytes") {
  const std::string prefix = folder.path(name);
  BinidxWriter writer(prefix, {.identity = identity, .vocab_size = kVocab, .end_of_document = 0});
  uint64_t noise = 12345;
  std::vector<int32_t> ids;
  for (int64_t i = 0, id = 1; i < tokens; ++i) {
    noise = noise * 6364136223846793005u + 1442695040888963407u;
    id = (noise >> 60) == 0 ? static_cast<int64_t>(noise >> 33) % kVocab : (id * 7 + 3) % kVocab;
    ids.push_back(static_cast<int32_t>(id));
  }
  writer.add_tokens(ids);
  writer.end_document();
  writer.finish(tokens);
  return prefix;
}

RunConfig small_run(const test::TempFolder& folder,
                    const std::string& run,
                    const std::string& version = "rwkv4") {
  RunConfig config;
  config.model = {.version = version,
                  .n_layer = 2,
                  .n_embd = 24,
                  .dim_att = version == "rwkv7" ? 24 : 32,
                  .dim_ffn = 40,
                  .head_size = version == "rwkv4" ? 0 : 8,
                  .ctx_len = 16};
  config.data.train = folder.path("corpus");
  config.train.run_dir = folder.path(run);
  config.train.batch_size = 4;
  config.train.total_steps = 12;
  config.train.log_every_steps = 1;
  config.train.threads = 2;
  config.schedule.lr_init = 1e-2;
  config.schedule.lr_final = 1e-3;
  return config;
}

// What metrics.jsonl says of every step, times left out.
std::vector<nlohmann::json> read_metrics(const std::string& run_dir) {
  std::vector<nlohmann::json> rows;
  std::istringstream lines(test::read_file(run_dir + "/metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const auto row = nlohmann::json::parse(line);
    rows.push_back(
        {{"step", row.at("step")}, {"loss", row.at("loss")}, {"norm", row.at("grad_norm")}});
  }
  return rows;
}

std::string newest_file(const std::string& run_dir, const char* name) {
  return test::read_file(newest_checkpoint(run_dir).value() + "/" + name);
}

// The trainer knows no version: what it does for one it does for all.
class TrainerOf : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(Versions,
                         TrainerOf,
                         testing::Values("rwkv4", "rwkv5", "rwkv6", "rwkv7"),
                         [](const auto& named) { return named.param; });

TEST_P(TrainerOf, LearnsWhatIsToBeLearnt) {
  for (const TrainDtype dtype : {TrainDtype::kFp32, TrainDtype::kBf16}) {
    const test::TempFolder folder;
    make_corpus(folder, "corpus", 4000);
    RunConfig config = small_run(folder, "run", GetParam());
    config.train.dtype = dtype;
    config.train.total_steps = 150;
    Trainer(config).run();
    const auto rows = read_metrics(config.train.run_dir);
    ASSERT_EQ(rows.size(), 150u);
    EXPECT_NEAR(rows.front().at("loss").get<double>(), std::log(kVocab), 1.0);
    // Noise of one in sixteen alone costs about 0.45 nats.
    EXPECT_LT(rows.back().at("loss").get<double>(), 1.0);
  }
}

TEST_P(TrainerOf, GoesOnBitForBitFromACheckpoint) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  RunConfig config = small_run(folder, "whole", GetParam());
  config.train.save_every_steps = 5;
  config.train.keep_checkpoints = 3;
  Trainer(config).run();

  // The same run as it would be had it died after step 7: step 5 is the last checkpoint.
  config.train.run_dir = folder.path("resumed");
  std::filesystem::create_directories(folder.path("resumed/checkpoints"));
  std::filesystem::copy(folder.path("whole/checkpoints/step_00000005"),
                        folder.path("resumed/checkpoints/step_00000005"),
                        std::filesystem::copy_options::recursive);
  std::string first_lines;
  std::istringstream metrics(test::read_file(folder.path("whole/metrics.jsonl")));
  for (std::string line; std::getline(metrics, line) && first_lines.size() < 7 * line.size();) {
    first_lines += line + "\n";
  }
  test::write_file(folder.path("resumed/metrics.jsonl"), first_lines);
  Trainer(config).run();

  EXPECT_EQ(read_metrics(folder.path("resumed")), read_metrics(folder.path("whole")));
  EXPECT_EQ(newest_file(folder.path("resumed"), "optimizer.safetensors"),
            newest_file(folder.path("whole"), "optimizer.safetensors"));
  // The configuration inside differs by the run's folder.
  const auto whole = test::load_tensors(newest_checkpoint(folder.path("whole")).value());
  for (const auto& [name, tensor] :
       test::load_tensors(newest_checkpoint(folder.path("resumed")).value())) {
    EXPECT_TRUE(test::same_bits(tensor, whole.at(name))) << name;
  }
  // And the time that it took.
  const auto progress = [&](const std::string& run) {
    auto json = nlohmann::json::parse(newest_file(folder.path(run), "trainer.json"));
    json.erase("elapsed_s");
    return json;
  };
  EXPECT_EQ(progress("resumed"), progress("whole"));
}

TEST(Trainer, LooksAtLayersAndHeadsWithoutAChangeToTheRun) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  RunConfig config = small_run(folder, "plain");
  config.model = {.version = "rwkv7", .n_layer = 2, .n_embd = 32, .head_size = 16, .ctx_len = 16};
  config.train.log_every_steps = 5;
  config.train.micro_batch_size = 2;
  Trainer(config).run();
  config.train.run_dir = folder.path("watched");
  config.train.telemetry_every_steps = 4;
  Trainer(config).run();
  EXPECT_EQ(newest_file(folder.path("watched"), "optimizer.safetensors"),
            newest_file(folder.path("plain"), "optimizer.safetensors"));
  std::istringstream lines(test::read_file(folder.path("watched/metrics.jsonl")));
  std::vector<int64_t> watched_steps;
  for (std::string line; std::getline(lines, line);) {
    const auto row = nlohmann::json::parse(line);
    if (row.contains("telemetry")) {
      watched_steps.push_back(row.at("step"));
      const auto& telemetry = row.at("telemetry");
      EXPECT_TRUE(telemetry.at("largest_logit").is_number());
      EXPECT_EQ(telemetry.size(), 5);
      for (const char* name : {"state_norm", "decay_slow", "iclr_low", "iclr_high"}) {
        ASSERT_EQ(telemetry.at(name).size(), 2) << name;
        EXPECT_EQ(telemetry.at(name)[1].size(), 2) << name;
      }
      EXPECT_GT(telemetry.at("state_norm")[0][1].get<double>(), 0);
    }
  }
  EXPECT_THAT(watched_steps, testing::ElementsAre(4, 8, 12));
}

TEST_P(TrainerOf, AccumulatesMicroBatchesToTheSameStep) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  RunConfig config = small_run(folder, "whole", GetParam());
  Trainer(config).run();
  config.train.run_dir = folder.path("parts");
  config.train.micro_batch_size = 1;
  Trainer(config).run();
  const auto whole = read_metrics(folder.path("whole"));
  const auto parts = read_metrics(folder.path("parts"));
  for (size_t i = 0; i < whole.size(); ++i) {
    EXPECT_NEAR(parts[i].at("loss").get<double>(), whole[i].at("loss").get<double>(), 1e-4) << i;
    const double norm = whole[i].at("norm").get<double>();
    EXPECT_NEAR(parts[i].at("norm").get<double>(), norm, 5e-5 * norm) << i;
  }
}

TEST(Trainer, KeepsTheNewestCheckpointsAndNoRemains) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  RunConfig config = small_run(folder, "run");
  config.train.save_every_steps = 3;
  std::filesystem::create_directories(folder.path("run/checkpoints/partial_step_00000002"));
  Trainer(config).run();
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path("run/checkpoints"))) {
    names.push_back(entry.path().filename().string());
  }
  EXPECT_THAT(names, testing::UnorderedElementsAre("step_00000009", "step_00000012"));
}

TEST(Trainer, DoesNothingWhereAllStepsAreDone) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  const RunConfig config = small_run(folder, "run");
  Trainer(config).run();
  const std::string metrics = test::read_file(folder.path("run/metrics.jsonl"));
  Trainer(config).run();
  EXPECT_EQ(test::read_file(folder.path("run/metrics.jsonl")), metrics);
}

TEST(Trainer, StopsBeforeAnUpdateThatIsNotFinite) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  RunConfig config = small_run(folder, "run");
  config.schedule.kind = ScheduleKind::kLinear;
  config.schedule.lr_final = 1e30;
  config.optimizer.clip_norm = 0;
  const std::string text = THROWN_TEXT(std::runtime_error, Trainer(config).run());
  EXPECT_THAT(text, HasSubstr("step 3: loss"));
  EXPECT_THAT(text, HasSubstr("on samples 8 to 11"));
  EXPECT_THAT(text, HasSubstr("There is no checkpoint yet"));
}

TEST(ResolveRunConfig, TakesTheVocabularyFromTheCorpus) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 100);
  RunConfig config = small_run(folder, "run");
  EXPECT_EQ(resolve_run_config(config).model.vocab_size, kVocab);
  config.model.vocab_size = 64;
  EXPECT_EQ(resolve_run_config(config).model.vocab_size, 64);
  config.model.vocab_size = 29;
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, resolve_run_config(config)),
              HasSubstr("model.vocab_size = 29"));
  std::filesystem::remove(folder.path("corpus.tokenizer.json"));
  config.model.vocab_size = 0;
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, resolve_run_config(config)),
              HasSubstr("model.vocab_size is not given"));
}

TEST(ResolveRunConfig, RefusesAnotherTokenizer) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 100, "world:0123");
  make_corpus(folder, "validation", 100, "bytes");
  RunConfig config = small_run(folder, "run");
  config.data.tokenizer = "bytes";
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, resolve_run_config(config)),
              testing::AllOf(HasSubstr("data.tokenizer = \"bytes\""), HasSubstr("world:0123")));
  config.data.tokenizer.reset();
  config.data.validation = folder.path("validation");
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, resolve_run_config(config)),
              testing::AllOf(HasSubstr("data.validation"), HasSubstr("world:0123")));
}

TEST(Evaluate, CountsEveryTokenButTheFirst) {
  const test::TempFolder folder;
  const BinidxFile corpus(make_corpus(folder, "corpus", 102));  // and its end: 103 tokens
  RwkvModel model(ModelConfig{.n_layer = 1, .n_embd = 8, .vocab_size = kVocab});
  model->initialise(1, 1e-2);
  // Whatever the windows and batches, a fresh model finds all tokens nearly alike.
  const Evaluation whole = evaluate(model, corpus, {.ctx_len = 1000});
  const Evaluation windows = evaluate(model, corpus, {.ctx_len = 10, .batch_size = 3});
  EXPECT_EQ(whole.num_tokens, 102);
  EXPECT_EQ(windows.num_tokens, 102);
  EXPECT_NEAR(whole.loss, std::log(kVocab), 0.6);
  EXPECT_NEAR(windows.loss, whole.loss, 0.1);
  EXPECT_EQ(evaluate(model, corpus, {.ctx_len = 10, .max_tokens = 25}).num_tokens, 25);
  // Batching alone changes nothing.
  // In three shares, the same windows; a share beyond the last is empty.
  double sum = 0;
  int64_t num_tokens = 0;
  for (int64_t share = 0; share < 3; ++share) {
    const Evaluation part =
        evaluate(model, corpus, {.ctx_len = 10, .batch_size = 2, .share = share, .num_shares = 3});
    EXPECT_LT(part.num_tokens, windows.num_tokens);
    sum += part.loss * static_cast<double>(part.num_tokens);
    num_tokens += part.num_tokens;
  }
  EXPECT_EQ(num_tokens, windows.num_tokens);
  EXPECT_NEAR(sum / static_cast<double>(num_tokens), windows.loss, 1e-6);
  const Evaluation none = evaluate(model, corpus, {.ctx_len = 1000, .share = 1, .num_shares = 2});
  EXPECT_EQ(none.num_tokens, 0);
  EXPECT_EQ(none.loss, 0);
  const Evaluation one_by_one = evaluate(model, corpus, {.ctx_len = 10, .batch_size = 1});
  EXPECT_NEAR(one_by_one.loss, windows.loss, 1e-6);
}

TEST(Evaluate, NamesATokenBeyondTheVocabulary) {
  const test::TempFolder folder;
  const BinidxFile corpus(make_corpus(folder, "corpus", 100));
  RwkvModel model(ModelConfig{.n_layer = 1, .n_embd = 8, .vocab_size = 20});
  model->initialise(1, 1e-2);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, evaluate(model, corpus, {})),
              testing::AllOf(HasSubstr("corpus.bin: the token at position "),
                             HasSubstr("vocabulary has 20 ids")));
}

TEST(FindModel, NamesARunWithoutCheckpoints) {
  const test::TempFolder folder;
  std::filesystem::create_directories(folder.path("run/checkpoints"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, find_model(folder.path("run"))),
              HasSubstr("holds no checkpoint yet"));
}

TEST(ConfigIn, IsWhatTheRunWasGiven) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  const RunConfig config = small_run(folder, "run");
  Trainer(config).run();
  const auto inside = config_in(read_weights(find_model(folder.path("run"))));
  ASSERT_TRUE(inside.has_value());
  EXPECT_EQ(*inside, resolve_run_config(config));
}

TEST(TokenizerIdentityIn, IsTheOneOfTheCorpus) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000, "world:0123");
  Trainer(small_run(folder, "run")).run();
  EXPECT_EQ(tokenizer_identity_in(read_weights(find_model(folder.path("run")))), "world:0123");
}

TEST(TokenizerIdentityIn, OfACorpusWithoutARecordIsTheConfiguredOneOrNone) {
  const test::TempFolder folder;
  make_corpus(folder, "corpus", 2000);
  std::filesystem::remove(folder.path("corpus.tokenizer.json"));
  RunConfig config = small_run(folder, "unknown");
  config.model.vocab_size = 256;
  Trainer(config).run();
  EXPECT_EQ(tokenizer_identity_in(read_weights(find_model(folder.path("unknown")))), std::nullopt);
  config.train.run_dir = folder.path("configured");
  config.data.tokenizer = "bytes";
  Trainer(config).run();
  EXPECT_EQ(tokenizer_identity_in(read_weights(find_model(folder.path("configured")))), "bytes");
}

}  // namespace
}  // namespace rwkv
