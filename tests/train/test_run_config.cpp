#include <algorithm>
#include <filesystem>
#include <limits>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/run_config.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::StartsWith;

constexpr int64_t kMost = std::numeric_limits<int64_t>::max();

// The least that validates: 4 sequences of 256 tokens a step, 100 steps.
RunConfig small_config() {
  RunConfig config;
  config.data.train = "corpus";
  config.train.run_dir = "run";
  config.train.batch_size = 4;
  config.train.total_steps = 100;
  return config;
}

constexpr const char* kSmallFile = R"([data]
train = "corpus"
[train]
run_dir = "run"
batch_size = 4
total_steps = 100
)";

std::string validate_error(const RunConfig& config) {
  return THROWN_TEXT(std::invalid_argument, config.validate());
}

std::string parse_error(const std::string& text) {
  return THROWN_TEXT(std::invalid_argument, parse_run_config(text, "a.toml"));
}

// The error of kSmallFile read with options.
std::string option_error(const std::vector<std::string>& options) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.toml"), kSmallFile);
  std::string text =
      THROWN_TEXT(std::invalid_argument, load_run_config(folder.path("a.toml"), options));
  const std::string path = folder.path();
  const size_t at = text.find(path);
  return at == std::string::npos ? text : text.erase(at, path.size());
}

// A configuration with no field at its default, and nothing absent that can be given.
RunConfig full_config() {
  RunConfig c;
  c.model = {.version = "rwkv7",
             .n_layer = 3,
             .n_embd = 128,
             .dim_att = 192,
             .dim_ffn = 512,
             .head_size = 64,
             .rank_mix = 24,
             .rank_decay = 32,
             .rank_iclr = 40,
             .rank_value = 48,
             .rank_gate = 56,
             .vocab_size = 65536,
             .ctx_len = 32};
  c.data = {.train = "corpora/a \"b\"",
            .validation = "corpora/valid",
            .tokenizer = "world:größe.txt",
            .order = SampleOrderKind::kRwkvLm};
  c.train = {.run_dir = "runs/x",
             .device = "cpu",
             .dtype = TrainDtype::kBf16,
             .seed = kMost,
             .batch_tokens = 256,
             .micro_batch_size = 2,
             .total_epochs = 1.0 / 3,
             .total_minutes = 90.5,
             .validate_every_steps = 10,
             .validation_tokens = 3200,
             .save_every_steps = 20,
             .save_every_minutes = 30,
             .keep_checkpoints = 5,
             .keep_every_steps = 1000,
             .log_every_steps = 3,
             .tensorboard = false,
             .telemetry_every_steps = 11,
             .threads = 7,
             .l2wrap = 2e-4,
             .skip_outliers_z = 6.5};
  c.init = {.from = "released.pth",
            .allow_missing = {"head.weight"},
            .allow_unexpected = {"blocks.*.att.v0", "x"},
            .vocab_growth = VocabGrowth::kMean,
            .state = "start.pth"};
  c.sample = {.every_steps = 9,
              .prompt = "In the\n\"beginning\"",
              .length = 17,
              .temperature = 0.7,
              .top_p = 0.6};
  c.distributed = {.timeout_s = 30, .zero = 1, .compare_weights_every_steps = 7};
  c.optimizer = {.beta1 = 0.8,
                 .beta2 = 0.95,
                 .eps = 1e-9,
                 .weight_decay = 0.01,
                 .clip_norm = 0.5,
                 .layerwise_lr = false,
                 .freeze = {"emb.*", "blocks.0.*"}};
  c.schedule = {.kind = ScheduleKind::kWarmupStableDecay,
                .lr_init = 1e-3,
                .lr_final = 1e-6,
                .warmup_tokens = 100,
                .decay_tokens = 200,
                .warmup_start = 0.01};
  return c;
}

TEST(RunConfigText, ReadsBackEqual) {
  for (const RunConfig& config : {full_config(), small_config()}) {
    EXPECT_EQ(parse_run_config(to_toml(config), "printed"), config) << to_toml(config);
  }
}

TEST(RunConfigText, NamesEveryValue) {
  for (const ScheduleKind kind : {ScheduleKind::kExponential,
                                  ScheduleKind::kLinear,
                                  ScheduleKind::kCosine,
                                  ScheduleKind::kConstant}) {
    RunConfig config = small_config();
    config.schedule.kind = kind;
    EXPECT_EQ(parse_run_config(to_toml(config), "printed"), config);
  }
  for (const SampleOrderKind order : {SampleOrderKind::kShuffled, SampleOrderKind::kSequential}) {
    RunConfig config = small_config();
    config.data.order = order;
    EXPECT_EQ(parse_run_config(to_toml(config), "printed"), config);
  }
}

TEST(RunConfigText, ShowsValuesAndWhatIsNotGiven) {
  const std::string text = to_toml(small_config());
  EXPECT_THAT(text,
              AllOf(StartsWith("[model]\nversion = \"rwkv4\" "),
                    HasSubstr("\nn_layer = 6 "),
                    HasSubstr("\n# vocab_size is not given "),
                    HasSubstr("\norder = \"shuffled\" "),
                    HasSubstr("\nbatch_size = 4 "),
                    HasSubstr("\n# batch_tokens is not given "),
                    HasSubstr("\neps = 1e-08 "),
                    HasSubstr("\nlayerwise_lr = true "),
                    HasSubstr("\nkind = \"exponential\" "),
                    HasSubstr("\nlr_init = 6e-04 ")));
  // Each line but the empty ones and [section] says what the key is, within the width of a screen.
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    EXPECT_LE(line.size(), 110U) << line;
    EXPECT_TRUE(line.empty() || line[0] == '[' || line.find("# ", 2) != line.npos) << line;
  }
}

TEST(RunConfigFile, GivesDefaultsWhereAFileIsSilent) {
  EXPECT_EQ(parse_run_config(kSmallFile, "a.toml"), small_config());
}

TEST(RunConfigFile, NamesTheLineOfAValueThatValidateRejects) {
  EXPECT_EQ(parse_error("[model]\nn_layer = 2\nn_embd = -3\n" + std::string(kSmallFile)),
            "a.toml:3: model.n_embd = -3: must be 1 or more");
  EXPECT_EQ(parse_error(std::string(kSmallFile) + "[schedule]\nwarmup_start = 2\n"),
            "a.toml:8: schedule.warmup_start = 2.0: must lie from 0.0 to 1.0");
  EXPECT_EQ(parse_error("[data]\n"),
            "a.toml: data.train is not given; set it to the prefix of a .bin and .idx pair");
}

TEST(RunConfigFile, NamesTheOptionThatValidateRejects) {
  EXPECT_EQ(option_error({"model.n_embd=-3"}),
            "--set model.n_embd=-3: model.n_embd = -3: must be 1 or more");
  EXPECT_EQ(option_error({"model.ctx_len=512", "model.n_embed=3"}),
            "--set model.n_embed=3: unknown key model.n_embed; did you mean model.n_embd?");
  EXPECT_THAT(option_error({"train.batch_tokens=512", "train.batch_size=2"}),
              StartsWith("--set train.batch_size=2: train.batch_size is not given alone"));
}

TEST(RunConfigFile, OptionsComeAfterTheFileInOrder) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.toml"), kSmallFile);
  const std::vector<std::string> options = {
      "train.seed=3", "train.seed=4", "train.total_epochs=1", "train.batch_tokens=512"};
  RunConfig expected = small_config();
  expected.train.seed = 4;
  expected.train.total_steps.reset();
  expected.train.total_epochs = 1;
  expected.train.batch_size.reset();
  expected.train.batch_tokens = 512;
  EXPECT_EQ(load_run_config(folder.path("a.toml"), options), expected);
}

TEST(RunConfigFile, OptionsAloneAreEnough) {
  const std::vector<std::string> options = {
      "data.train=corpus", "train.run_dir=run", "train.batch_size=4", "train.total_steps=100"};
  EXPECT_EQ(load_run_config(std::nullopt, options), small_config());
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, load_run_config(std::nullopt, {})),
              StartsWith("data.train is not given"));
}

TEST(RunConfigFile, NamesAFileThatIsNotThere) {
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, load_run_config("no/such.toml", {})),
              HasSubstr("no/such.toml"));
}

// What the comments at the top of a configuration ask for beside the file: "--set key=VALUE" each.
std::vector<std::string> options_named_at_top(const std::string& text) {
  const std::string top = text.substr(0, text.find("\n["));
  const std::regex option(R"(--set ([a-z_]+\.[a-z_]+=[A-Za-z_.]+))");
  std::vector<std::string> options;
  for (std::sregex_iterator match(top.begin(), top.end(), option), end; match != end; ++match) {
    options.push_back((*match)[1]);
  }
  return options;
}

TEST(RunConfigFile, EveryShippedConfigurationIsValidAsItsTopSays) {
  int64_t num_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("configs")) {
    ASSERT_EQ(entry.path().extension(), ".toml") << entry.path();
    const std::string text = test::read_file(entry.path().string());
    EXPECT_THAT(text, StartsWith("# ")) << "says what to expect";
    const RunConfig config = load_run_config(entry.path().string(), options_named_at_top(text));
    EXPECT_EQ(parse_run_config(to_toml(config), "printed"), config);
    ++num_files;
  }
  EXPECT_GE(num_files, 3);
}

TEST(RunConfigValidate, AcceptsTheSmallAndTheFull) {
  small_config().validate();
  full_config().validate();
}

// One value out of range, and the start of the error.
struct BadValue {
  const char* option;
  const char* error;
};
// The test's name in a list of tests.
void PrintTo(const BadValue& value, std::ostream* out) {
  *out << value.option;
}

class RunConfigRange : public testing::TestWithParam<BadValue> {};

TEST_P(RunConfigRange, IsChecked) {
  const std::string place = std::string("--set ") + GetParam().option + ": ";
  EXPECT_THAT(option_error({"data.validation=valid", GetParam().option}),
              StartsWith(place + GetParam().error));
}

INSTANTIATE_TEST_SUITE_P(
    Keys,
    RunConfigRange,
    testing::Values(
        BadValue{"model.n_layer=-1", "model.n_layer = -1: must be 1 or more"},
        BadValue{"model.ctx_len=0", "model.ctx_len = 0: "},
        BadValue{"model.vocab_size=-1", "model.vocab_size = -1: "},
        BadValue{"init.allow_missing=[\"x\"]", "init.allow_missing is given without init.from"},
        BadValue{"init.vocab_growth=mean", "init.vocab_growth is given without init.from"},
        BadValue{"data.train=\"\"", "data.train is not given"},
        BadValue{"data.validation=\"\"", "data.validation = \"\": is empty"},
        BadValue{"data.tokenizer=\"\"", "data.tokenizer = \"\": is empty"},
        BadValue{"data.order=random",
                 "data.order = \"random\" (a string): expected \"shuffled\", \"sequential\" or "
                 "\"rwkv_lm\""},
        BadValue{"train.run_dir=\"\"", "train.run_dir is not given"},
        BadValue{"train.device=gpu", "train.device = \"gpu\": expected \"cpu\", \"cuda\", or"},
        BadValue{"train.device=cuda:x", "train.device = \"cuda:x\": expected"},
        BadValue{"train.dtype=fp16", "train.dtype = \"fp16\" (a string): expected \"fp32\" or"},
        BadValue{"train.recompute=all", "train.recompute = \"all\" (a string): expected \"none\""},
        BadValue{"train.seed=-1", "train.seed = -1: must be 0 or more"},
        BadValue{"train.batch_size=0", "train.batch_size = 0: "},
        BadValue{"train.batch_tokens=0", "train.batch_tokens = 0: "},
        BadValue{"train.batch_tokens=100",
                 "train.batch_tokens = 100: is not a multiple of model.ctx_len = 256; use 256"},
        BadValue{"train.batch_tokens=1000",
                 "train.batch_tokens = 1000: is not a multiple of model.ctx_len = 256; use 768"},
        BadValue{"train.batch_size=9223372036854775807",
                 "train.batch_size = 9223372036854775807: must be at most 2147483648"},
        BadValue{"train.threads=4294967297", "train.threads = 4294967297: must be at most 4096"},
        BadValue{"model.dim_ffn=1152921504606846976",
                 "model.dim_ffn = 1152921504606846976: must be at most 2147483648"},
        BadValue{"schedule.lr_init=1e308", "schedule.lr_init = 1e+308: must lie from 0.0 to 1e+38"},
        BadValue{"train.micro_batch_size=0", "train.micro_batch_size = 0: "},
        BadValue{"train.micro_batch_size=3",
                 "train.micro_batch_size = 3: does not divide the batch of 4 sequences"},
        BadValue{"train.micro_batch_size=8", "train.micro_batch_size = 8: does not divide"},
        BadValue{"train.total_tokens=0", "train.total_tokens = 0: "},
        BadValue{"train.total_tokens=9223372036854775807",
                 "train.total_tokens = 9223372036854775807: rounded up"},
        BadValue{"train.total_steps=0", "train.total_steps = 0: "},
        BadValue{"train.total_steps=9223372036854775807",
                 "train.total_steps = 9223372036854775807: times"},
        BadValue{"train.total_epochs=0", "train.total_epochs = 0.0: "},
        BadValue{"train.total_epochs=nan", "train.total_epochs = nan: "},
        BadValue{"train.validate_every_steps=0", "train.validate_every_steps = 0: "},
        BadValue{"train.validation_tokens=0", "train.validation_tokens = 0: "},
        BadValue{"train.validation_tokens=255",
                 "train.validation_tokens = 255: is less than one sequence of model.ctx_len = 256"},
        BadValue{"train.save_every_steps=0", "train.save_every_steps = 0: "},
        BadValue{"train.keep_checkpoints=0", "train.keep_checkpoints = 0: "},
        BadValue{"train.log_every_steps=0", "train.log_every_steps = 0: "},
        BadValue{"train.threads=0", "train.threads = 0: "},
        BadValue{"train.l2wrap=-1", "train.l2wrap = -1.0: "},
        BadValue{"train.l2wrap=inf", "train.l2wrap = inf: "},
        BadValue{"optimizer.beta1=1", "optimizer.beta1 = 1.0: must lie from 0.0 to below 1.0"},
        BadValue{"optimizer.beta2=-0.1", "optimizer.beta2 = -0.1: "},
        BadValue{"optimizer.beta2=nan", "optimizer.beta2 = nan: "},
        BadValue{"optimizer.eps=0", "optimizer.eps = 0.0: must be a finite number above 0"},
        BadValue{"optimizer.weight_decay=-1", "optimizer.weight_decay = -1.0: "},
        BadValue{"train.telemetry_every_steps=0", "train.telemetry_every_steps = 0: "},
        BadValue{"init.state=\"\"", "init.state = \"\": is empty"},
        BadValue{"train.skip_outliers_z=0", "train.skip_outliers_z = 0.0: must be a finite"},
        BadValue{"optimizer.clip_norm=-1", "optimizer.clip_norm = -1.0: "},
        BadValue{"schedule.lr_init=-1", "schedule.lr_init = -1.0: "},
        BadValue{"schedule.warmup_tokens=102400",
                 "schedule.warmup_tokens = 102400: the run has 102400 tokens"}));

TEST(RunConfigValidate, WantsExactlyOneBatchAndALength) {
  RunConfig config = small_config();
  config.train.batch_tokens = 1024;
  EXPECT_EQ(validate_error(config),
            "train.batch_size is not given alone; give only one of train.batch_size, "
            "train.batch_tokens");
  config.train.batch_tokens.reset();
  config.train.batch_size.reset();
  EXPECT_EQ(validate_error(config),
            "train.batch_size is not given; give one of train.batch_size, train.batch_tokens");
  config = small_config();
  config.train.total_steps.reset();
  EXPECT_THAT(validate_error(config), StartsWith("train.total_tokens is not given; give one of"));
}

TEST(RunConfigValidate, LetsMinutesAloneEndOnlyARunOfConstantRate) {
  RunConfig config = small_config();
  config.train.total_steps.reset();
  config.train.total_minutes = 1.5;
  EXPECT_THAT(validate_error(config), StartsWith("train.total_minutes = 1.5: is the only end"));
  config.schedule.kind = ScheduleKind::kConstant;
  config.validate();
  EXPECT_EQ(config.total_steps(10), std::nullopt);
  EXPECT_EQ(config.total_steps_key(10), "");
}

TEST(RunConfigValidate, WantsATokenizerForSamples) {
  RunConfig config = small_config();
  config.sample.every_steps = 5;
  EXPECT_THAT(validate_error(config),
              StartsWith("sample.every_steps = 5: there is no data.tokenizer"));
}

TEST(RunConfigValidate, LeavesSizesOpenOnlyToWeights) {
  const std::vector<std::string> options = {
      "data.train=corpus", "train.run_dir=run", "train.batch_size=4", "train.total_steps=100"};
  const RunConfig fresh = load_run_config(std::nullopt, options);
  EXPECT_EQ(fresh.model.version, "rwkv4");
  EXPECT_EQ(fresh.model.n_layer, 6);
  auto with_weights = options;
  with_weights.push_back("init.from=a.pth");
  const RunConfig continued = load_run_config(std::nullopt, with_weights);
  EXPECT_EQ(continued.model.version, "");
  EXPECT_EQ(continued.model.n_layer, 0);
  EXPECT_EQ(continued.model.n_embd, 0);
}

TEST(RunConfigValidate, RejectsValidationSettingsWithNothingToValidateOn) {
  RunConfig config = small_config();
  config.train.validate_every_steps = 10;
  EXPECT_THAT(validate_error(config),
              StartsWith("train.validate_every_steps = 10: there is no data.validation"));
  config = small_config();
  config.train.validation_tokens = 1000;
  EXPECT_THAT(validate_error(config), StartsWith("train.validation_tokens = 1000: there is no"));
}

TEST(RunConfigDerived, CountsTheStepsOfEachKindOfLength) {
  RunConfig config = small_config();
  EXPECT_EQ(config.batch_sequences(), 4);
  EXPECT_EQ(config.micro_batch_sequences(), 4);
  EXPECT_EQ(config.tokens_per_step(), 1024);
  EXPECT_EQ(config.total_steps(0), 100);
  EXPECT_EQ(config.total_tokens(0), 102400);

  config.train.batch_size.reset();
  config.train.batch_tokens = 512;
  config.train.micro_batch_size = 1;
  EXPECT_EQ(config.batch_sequences(), 2);
  EXPECT_EQ(config.micro_batch_sequences(), 1);
  EXPECT_EQ(config.tokens_per_step(), 512);

  config.train.total_steps.reset();
  config.train.total_tokens = 1024;
  EXPECT_EQ(config.total_steps(0), 2);
  config.train.total_tokens = 1025;
  EXPECT_EQ(config.total_steps(0), 3);
  EXPECT_EQ(config.total_tokens(0), 1536);

  config.train.total_tokens.reset();
  config.train.total_epochs = 1;
  EXPECT_EQ(config.total_steps(10), 5);
  EXPECT_EQ(config.total_steps(11), 6);
  config.train.total_epochs = 2;
  EXPECT_EQ(config.total_steps(11), 11);
  config.train.total_epochs = 0.5;
  EXPECT_EQ(config.total_steps(100), 25);
  // 1.1 * 50 is 55.00000000000001 in doubles, and 55 samples are 11 steps of 5.
  config.train.batch_tokens = 5 * 256;
  config.train.total_epochs = 1.1;
  EXPECT_EQ(config.total_steps(50), 11);
  config.train.total_epochs = 1e-9;
  EXPECT_EQ(config.total_steps(20), 1);
}

constexpr int64_t kSamplesPerEpoch = 1000;

void check_resume(const RunConfig& now, const RunConfig& saved, int64_t tokens_seen) {
  check_matches_checkpoint(now,
                           saved,
                           {.checkpoint = "run/step_9",
                            .tokens_seen = tokens_seen,
                            .samples_per_epoch = kSamplesPerEpoch});
}

std::string resume_error(const RunConfig& now, const RunConfig& saved, int64_t tokens_seen) {
  return THROWN_TEXT(std::invalid_argument, check_resume(now, saved, tokens_seen));
}

TEST(RunConfigResume, AcceptsTheSame) {
  check_resume(small_config(), small_config(), 51200);
  check_resume(full_config(), full_config(), 512);
}

TEST(RunConfigResume, ListsEveryDifferenceThatChangesTheRun) {
  RunConfig now = small_config();
  now.model.n_layer = 12;
  now.data.order = SampleOrderKind::kRwkvLm;
  now.train.seed = 7;
  now.train.log_every_steps = 1;
  now.optimizer.layerwise_lr = false;
  now.model.vocab_size = 256;
  EXPECT_EQ(resume_error(now, small_config(), 51200),
            "run/step_9: cannot go on with another configuration than the run began with:\n"
            "  model.n_layer: 6 in the checkpoint, now 12\n"
            "  model.vocab_size: not given in the checkpoint, now 256\n"
            "  data.order: \"shuffled\" in the checkpoint, now \"rwkv_lm\"\n"
            "  train.seed: 1 in the checkpoint, now 7\n"
            "  optimizer.layerwise_lr: true in the checkpoint, now false\n"
            "Set them back to go on, or start a new run in another train.run_dir");
}

TEST(RunConfigResume, LetsHowTheRunIsHandledDiffer) {
  const RunConfig saved = full_config();
  RunConfig now = full_config();
  now.train.run_dir = "elsewhere";
  now.train.micro_batch_size = 4;
  now.train.validate_every_steps.reset();
  now.train.validation_tokens.reset();
  now.train.save_every_steps = 1;
  now.train.keep_checkpoints = 1;
  now.train.log_every_steps = 1;
  now.train.threads.reset();
  now.data.train = "moved";
  now.data.validation.reset();
  now.data.tokenizer.reset();
  now.init.from = "moved.pth";
  now.init.state = "moved.st";
  now.train.total_minutes = 3;
  now.train.save_every_minutes = 4;
  now.train.keep_every_steps = 5;
  now.train.tensorboard = true;
  now.train.telemetry_every_steps.reset();
  now.train.skip_outliers_z.reset();
  now.sample = {.prompt = "b", .length = 7, .temperature = 0.3, .top_p = 0.4};
  now.distributed = {.timeout_s = 9, .zero = 2, .compare_weights_every_steps = 8};
  check_resume(now, saved, 512);
}

// "section.key" of every line of a printed configuration.
std::vector<std::string> keys_of(const std::string& text) {
  std::vector<std::string> keys;
  std::string section;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t start = line.starts_with("# ") ? 2 : 0;
    if (line.starts_with("[")) {
      section = line.substr(1, line.size() - 2);
    } else if (!line.empty()) {
      keys.push_back(section + "." + line.substr(start, line.find(' ', start) - start));
    }
  }
  return keys;
}

// Each changed alone; with those of the test above and the lengths of the run, these are all.
TEST(RunConfigResume, EveryOtherKeyMustMatch) {
  const RunConfig saved = full_config();
  std::vector<std::string> keys = keys_of(to_toml(saved));
  for (const char* key : {"data.train",
                          "init.from",
                          "init.state",
                          "data.validation",
                          "data.tokenizer",
                          "train.run_dir",
                          "train.device",
                          "train.cuda_graph",
                          "train.recompute",
                          "train.micro_batch_size",
                          "train.validate_every_steps",
                          "train.validation_tokens",
                          "train.save_every_steps",
                          "train.keep_checkpoints",
                          "train.save_every_minutes",
                          "train.keep_every_steps",
                          "train.total_minutes",
                          "train.log_every_steps",
                          "train.tensorboard",
                          "train.telemetry_every_steps",
                          "train.threads",
                          "train.skip_outliers_z",
                          "sample.every_steps",
                          "sample.prompt",
                          "sample.length",
                          "sample.temperature",
                          "sample.top_p",
                          "distributed.timeout_s",
                          "distributed.zero",
                          "distributed.compare_weights_every_steps",
                          "train.batch_size",
                          "train.total_tokens",
                          "train.total_steps",
                          "train.total_epochs"}) {
    ASSERT_EQ(std::erase(keys, key), 1U) << key;
  }
  const auto changed = [](RunConfig config, const auto& change) {
    change(config);
    return config;
  };
  const std::vector<std::pair<const char*, RunConfig>> cases = {
      {"model.version", changed(saved, [](auto& c) { c.model.version = "rwkv4"; })},
      {"model.n_layer", changed(saved, [](auto& c) { c.model.n_layer = 1; })},
      {"model.n_embd", changed(saved, [](auto& c) { c.model.n_embd = 1; })},
      {"model.dim_att", changed(saved, [](auto& c) { c.model.dim_att = 1; })},
      {"model.dim_ffn", changed(saved, [](auto& c) { c.model.dim_ffn = 1; })},
      {"model.head_size", changed(saved, [](auto& c) { c.model.head_size = 1; })},
      {"model.rank_mix", changed(saved, [](auto& c) { c.model.rank_mix = 1; })},
      {"model.rank_decay", changed(saved, [](auto& c) { c.model.rank_decay = 1; })},
      {"model.rank_iclr", changed(saved, [](auto& c) { c.model.rank_iclr = 1; })},
      {"model.rank_value", changed(saved, [](auto& c) { c.model.rank_value = 1; })},
      {"model.rank_gate", changed(saved, [](auto& c) { c.model.rank_gate = 1; })},
      {"model.vocab_size", changed(saved, [](auto& c) { c.model.vocab_size = 1; })},
      {"model.ctx_len", changed(saved, [](auto& c) { c.model.ctx_len = 64; })},
      {"data.order", changed(saved, [](auto& c) { c.data.order = SampleOrderKind::kShuffled; })},
      {"init.allow_missing", changed(saved, [](auto& c) { c.init.allow_missing = {"b"}; })},
      {"init.allow_unexpected", changed(saved, [](auto& c) { c.init.allow_unexpected = {"b"}; })},
      {"init.vocab_growth",
       changed(saved, [](auto& c) { c.init.vocab_growth = VocabGrowth::kZero; })},
      {"optimizer.freeze", changed(saved, [](auto& c) { c.optimizer.freeze = {"b"}; })},
      {"train.dtype", changed(saved, [](auto& c) { c.train.dtype = TrainDtype::kFp32; })},
      {"train.seed", changed(saved, [](auto& c) { c.train.seed = 1; })},
      {"train.batch_tokens", changed(saved, [](auto& c) { c.train.batch_tokens = 512; })},
      {"train.l2wrap", changed(saved, [](auto& c) { c.train.l2wrap = 0; })},
      {"optimizer.beta1", changed(saved, [](auto& c) { c.optimizer.beta1 = 0; })},
      {"optimizer.beta2", changed(saved, [](auto& c) { c.optimizer.beta2 = 0; })},
      {"optimizer.eps", changed(saved, [](auto& c) { c.optimizer.eps = 1; })},
      {"optimizer.weight_decay", changed(saved, [](auto& c) { c.optimizer.weight_decay = 0; })},
      {"optimizer.clip_norm", changed(saved, [](auto& c) { c.optimizer.clip_norm = 0; })},
      {"optimizer.layerwise_lr", changed(saved, [](auto& c) { c.optimizer.layerwise_lr = true; })},
      {"schedule.kind", changed(saved, [](auto& c) { c.schedule.kind = ScheduleKind::kLinear; })},
      {"schedule.lr_init", changed(saved, [](auto& c) { c.schedule.lr_init = 1; })},
      {"schedule.lr_final", changed(saved, [](auto& c) { c.schedule.lr_final = 1; })},
      {"schedule.warmup_tokens", changed(saved, [](auto& c) { c.schedule.warmup_tokens = 1; })},
      {"schedule.decay_tokens", changed(saved, [](auto& c) { c.schedule.decay_tokens = 1; })},
      {"schedule.warmup_start", changed(saved, [](auto& c) { c.schedule.warmup_start = 1; })},
  };
  for (const auto& [key, now] : cases) {
    EXPECT_THAT(resume_error(now, saved, 512), HasSubstr("\n  " + std::string(key) + ": "));
    EXPECT_EQ(std::erase(keys, key), 1U) << key;
  }
  EXPECT_THAT(keys, testing::IsEmpty()) << "keys that no case above changes";
}

TEST(RunConfigResume, ComparesBatchAndLengthByWhatTheyMean) {
  RunConfig now = small_config();
  now.train.batch_size.reset();
  now.train.batch_tokens = 1024;
  now.train.total_steps.reset();
  now.train.total_tokens = 102400;
  check_resume(now, small_config(), 51200);
  now.train.batch_tokens = 2048;
  EXPECT_THAT(resume_error(now, small_config(), 51200),
              AllOf(HasSubstr("train.batch_size: 4 in the checkpoint, now not given"),
                    HasSubstr("train.batch_tokens: not given in the checkpoint, now 2048")));
}

TEST(RunConfigResume, LetsTheLengthDifferOnlyWhereTheRateSoFarDoesNot) {
  RunConfig saved = small_config();
  RunConfig now = small_config();
  now.train.total_steps = 200;
  EXPECT_THAT(resume_error(now, saved, 51200),
              HasSubstr("train.total_steps: 100 in the checkpoint, now 200"));
  EXPECT_THAT(resume_error(now, saved, 102400), HasSubstr("train.total_steps"));

  saved.schedule.kind = now.schedule.kind = ScheduleKind::kConstant;
  check_resume(now, saved, 51200);
  // Not below what has been done.
  now.train.total_steps = 49;
  EXPECT_THAT(resume_error(now, saved, 51200), HasSubstr("train.total_steps"));
  now.train.total_steps = 50;
  check_resume(now, saved, 51200);

  saved.schedule.kind = now.schedule.kind = ScheduleKind::kWarmupStableDecay;
  saved.schedule.decay_tokens = now.schedule.decay_tokens = 20 * 1024;
  now.train.total_steps = 200;
  check_resume(now, saved, 80 * 1024);
  EXPECT_THAT(resume_error(now, saved, 81 * 1024), HasSubstr("train.total_steps"));
}

}  // namespace
}  // namespace rwkv
