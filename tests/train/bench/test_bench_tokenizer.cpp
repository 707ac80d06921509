#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/bench/bench_tokenizer.h"

namespace rwkv {
namespace {

double figure(const BenchRow& row, const std::string& name) {
  for (const auto& [key, value] : row.figures) {
    if (key == name) {
      return value;
    }
  }
  ADD_FAILURE() << row.what << " has no figure " << name;
  return 0;
}

TEST(BenchTokenizer, CountsTheTokensAndBytesOfEveryDocumentOnce) {
  const std::vector<std::string> documents{std::string(300'000, 'x'), "", "Grüße"};
  const BenchRow row = bench_tokenizer("bytes", documents, 3);
  EXPECT_EQ(row.what, "tokenizer bytes");
  EXPECT_EQ(row.ms.repeats, 3);
  EXPECT_EQ(figure(row, "tokens"), 300'007);
  EXPECT_NEAR(figure(row, "mb_per_s"), 0.300007 / (row.ms.median / 1000), 1e-6);
  EXPECT_GT(figure(row, "load_ms"), 0);
}

TEST(InventedDocuments, AreTheSameOnEveryCallAndAsLongAsAskedFor) {
  const std::vector<std::string> documents = invented_documents(50'001);
  EXPECT_EQ(documents.size(), 13u);
  EXPECT_THAT(documents, testing::Each(testing::SizeIs(4000)));
  EXPECT_EQ(invented_documents(50'001), documents);
  EXPECT_NE(documents[0], documents[1]);
}

// A tokenizer made for English must find words in them: about 4.5 bytes a token in real text, and
// 1 in noise.
TEST(InventedDocuments, AreTextToATokenizerNotNoise) {
  const std::string vocabulary = test::find_test_data("tokenizers/rwkv_vocab_v20230424.txt");
  SKIP_WITHOUT(vocabulary);
  const std::vector<std::string> documents = invented_documents(100'000);
  const BenchRow row = bench_tokenizer("world:" + vocabulary, documents, 1);
  EXPECT_GT(100'000 / figure(row, "tokens"), 2.5);
}

TEST(ReadDocuments, ArePiecedTogether) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.txt"), std::string(2'500'000, 'y'));
  test::write_file(folder.path("b.jsonl"), "{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
  TextReader reader({folder.path("a.txt"), folder.path("b.jsonl")}, {});
  EXPECT_THAT(read_documents(reader),
              testing::ElementsAre(std::string(2'500'000, 'y'), "one", "two"));
}

}  // namespace
}  // namespace rwkv
