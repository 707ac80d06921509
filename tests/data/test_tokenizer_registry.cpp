#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/atomic_file.h"
#include "data/tokenizer_registry.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

TEST(TokenizerRegistry, OpensEachKind) {
  EXPECT_EQ(open_tokenizer("bytes")->identity(), "bytes");
  EXPECT_THAT(open_tokenizer("sentencepiece:" + test::golden("dummy_prefix.model"))->identity(),
              StartsWith("sentencepiece:"));
  const std::string world = test::find_test_data("tokenizers/rwkv_vocab_v20230424.txt");
  const std::string neox = test::find_test_data("tokenizers/20B_tokenizer.json");
  SKIP_WITHOUT(world);
  SKIP_WITHOUT(neox);
  EXPECT_THAT(open_tokenizer("world:" + world)->identity(), StartsWith("world:"));
  EXPECT_THAT(open_tokenizer("neox:" + neox)->identity(), StartsWith("neox:"));
}

TEST(TokenizerRegistry, ListsTheKindsWhereASpecIsOfNone) {
  for (const std::string spec :
       {"", "llama", "world:", "neox", "neox:", "bytes:x", "World", ":x"}) {
    const std::string text = THROWN_TEXT(std::invalid_argument, open_tokenizer(spec));
    EXPECT_THAT(text, StartsWith("tokenizer \"" + spec + "\""));
    for (const char* known : {"world", "world:FILE", "neox:FILE", "sentencepiece:FILE", "bytes"}) {
      EXPECT_THAT(text, HasSubstr(known));
      EXPECT_THAT(describe_tokenizer_specs(), HasSubstr(known));
    }
  }
}

TEST(TokenizerRegistry, NamesAFileThatIsNotThere) {
  for (const std::string kind : {"world", "neox", "sentencepiece"}) {
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, open_tokenizer(kind + ":/no/such:file")),
                StartsWith("/no/such:file: "));
  }
}

TEST(TokenizerRegistry, FindsInstalledFilesBesideTheFolderOfTheProgram) {
  const test::TempFolder folder;
  std::filesystem::create_directories(folder.path("bin"));
  std::filesystem::create_directories(folder.path("share/rookery"));
  const std::string text =
      THROWN_TEXT(std::runtime_error, find_installed_file("vocab.txt", folder.path("bin/rookery")));
  EXPECT_THAT(text, StartsWith(folder.path("share/rookery/vocab.txt")));
  EXPECT_THAT(text, HasSubstr("scripts/setup.sh"));
  test::write_file(folder.path("share/rookery/vocab.txt"), "x");
  EXPECT_EQ(find_installed_file("vocab.txt", folder.path("bin/rookery")),
            folder.path("share/rookery/vocab.txt"));
}

TEST(TokenizerRegistry, LooksBesideThisProgramIfNoneIsNamed) {
  const auto program = std::filesystem::read_symlink("/proc/self/exe");
  const std::string text = THROWN_TEXT(std::runtime_error, find_installed_file("no such file"));
  EXPECT_THAT(text, StartsWith((program.parent_path().parent_path() / "share/rookery").string()));
}

}  // namespace
}  // namespace rwkv
