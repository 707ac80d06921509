#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/byte_tokenizer.h"
#include "tests/support/test_data.h"
#include "train/model_tokenizer.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;

WeightFile model_file(const std::string& key, const std::string& value) {
  WeightFile file;
  file.path = "a.safetensors";
  file.metadata[key] = value;
  return file;
}

WeightFile trained_with(const std::string& identity) {
  return model_file(kTokenizerKey, identity);
}

std::string config_with(const std::string& spec) {
  RunConfig config;
  config.model.n_layer = 1;
  config.model.n_embd = 8;
  config.data.train = "corpus";
  config.data.tokenizer = spec;
  config.train.run_dir = "run";
  config.train.batch_size = 1;
  config.train.total_steps = 1;
  return to_toml(config);
}

TEST(OpenTokenizerOf, TakesTheConfiguredOneUnlessAnotherIsNamed) {
  WeightFile model = model_file(kRunConfigKey, config_with("bytes"));
  EXPECT_EQ(open_tokenizer_of(model, std::nullopt)->identity(), "bytes");
  model.metadata[kRunConfigKey] = config_with("world:nowhere.txt");
  EXPECT_EQ(open_tokenizer_of(model, "bytes")->identity(), "bytes");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, open_tokenizer_of(model, std::nullopt)),
              HasSubstr("nowhere.txt"));
}

TEST(OpenTokenizerOf, AsksForOneWhereNobodySaysWhich) {
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument,
                  open_tokenizer_of(model_file("format", "pt"), std::nullopt)),
      AllOf(HasSubstr("a.safetensors"), HasSubstr("give --tokenizer"), HasSubstr("world:FILE")));
}

TEST(OpenTokenizerOf, RefusesAnotherThanTheModelWasTrainedWith) {
  EXPECT_EQ(open_tokenizer_of(trained_with("bytes"), "bytes")->identity(), "bytes");
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument, open_tokenizer_of(trained_with("world:12"), "bytes")),
      AllOf(HasSubstr("tokenizer \"bytes\" is of the tokenizer bytes"),
            HasSubstr("a.safetensors was trained with world:12")));
  // The configured one is checked, too: its file may have changed since.
  WeightFile model = trained_with("world:12");
  model.metadata[kRunConfigKey] = config_with("bytes");
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, open_tokenizer_of(model, std::nullopt)),
              HasSubstr("world:12"));
}

TEST(RequireVocabularyFor, NamesBothSizes) {
  EXPECT_NO_THROW(require_vocabulary_for(ByteTokenizer(), 256));
  EXPECT_NO_THROW(require_vocabulary_for(ByteTokenizer(), 300));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, require_vocabulary_for(ByteTokenizer(), 255)),
              AllOf(HasSubstr("256 ids"), HasSubstr("vocabulary is 255")));
}

}  // namespace
}  // namespace rwkv
