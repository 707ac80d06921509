#include <atomic>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/byte_tokenizer.h"
#include "data/tokenize_corpus.h"
#include "data/world_tokenizer.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

// One token a word with the space behind it: 1 + a hash of it. A word is held back until its space
// or the end is seen, however long it grows: the hardest case for encoding in pieces.
class WordTokenizer : public Tokenizer {
 public:
  using Tokenizer::decode;
  size_t encode_part(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const override {
    size_t done = 0;
    while (done < text.size()) {
      const size_t space = text.find(' ', done);
      if (space == std::string_view::npos && end == TextEnd::kMore) {
        break;
      }
      const std::string_view word =
          text.substr(done, space == std::string_view::npos ? space : space + 1 - done);
      ids.push_back(static_cast<int32_t>(1 + std::hash<std::string_view>()(word) % 99'999));
      done += word.size();
    }
    longest_call_ = std::max(longest_call_.load(), text.size());
    return done;
  }
  void decode(std::span<const int32_t>, std::string&) const override {}
  int64_t vocab_size() const override { return 100'000; }
  std::optional<int32_t> end_of_document() const override { return 0; }
  bool is_lossless() const override { return false; }
  std::string identity() const override { return "words"; }

  mutable std::atomic<size_t> longest_call_ = 0;
};

struct Tokenized {
  TokenizeResult result;
  std::vector<int64_t> ids;
  int64_t documents = 0;
  TokenizerRecord record;
};

Tokenized tokenize(const test::TempFolder& folder,
                   const std::vector<std::string>& paths,
                   const Tokenizer& tokenizer) {
  TextReader reader(paths, {});
  BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
  Tokenized out;
  out.result = tokenize_corpus(reader, tokenizer, writer);
  const BinidxFile file(folder.path("corpus"));
  out.ids.resize(static_cast<size_t>(file.num_tokens()));
  file.read(0, out.ids);
  out.documents = file.num_documents();
  out.record = file.tokenizer_record().value();
  EXPECT_EQ(out.result.tokens, file.num_tokens());
  EXPECT_EQ(out.result.documents, file.num_documents());
  EXPECT_EQ(out.record.text_bytes, out.result.text_bytes);
  return out;
}

// The ids of whole documents, each followed by `end`.
std::vector<int64_t> expected_ids(const Tokenizer& tokenizer,
                                  const std::vector<std::string>& documents) {
  std::vector<int64_t> ids;
  for (const std::string& document : documents) {
    const std::vector<int32_t> encoded = tokenizer.encode(document);
    ids.insert(ids.end(), encoded.begin(), encoded.end());
    ids.push_back(*tokenizer.end_of_document());
  }
  return ids;
}

std::string random_words(size_t bytes, size_t mean_length) {
  std::mt19937_64 random(bytes);
  std::string text(bytes, '\0');
  for (char& c : text) {
    c = random() % mean_length == 0 ? ' ' : static_cast<char>('a' + random() % 26);
  }
  return text;
}

TEST(TokenizeCorpus, WritesDocumentsEachWithItsEnd) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl"),
                   "{\"text\":\"ab\"}\n{\"text\":\"\"}\n{\"text\":\"c\"}\n");
  test::write_file(folder.path("b.txt"), "de");
  const Tokenized out =
      tokenize(folder, {folder.path("a.jsonl"), folder.path("b.txt")}, ByteTokenizer());
  EXPECT_THAT(out.ids, ElementsAre('a', 'b', 0, 'c', 0, 'd', 'e', 0));
  EXPECT_EQ(out.result.documents, 3);
  EXPECT_EQ(out.result.text_bytes, 5);
  EXPECT_EQ(out.record.identity, "bytes");
  EXPECT_EQ(out.record.vocab_size, 256);
  EXPECT_EQ(out.record.end_of_document, 0);
}

TEST(TokenizeCorpus, EncodesPiecesAsItWouldTheWholeText) {
  const test::TempFolder folder;
  const WordTokenizer tokenizer;
  for (const size_t mean_length : {8, 100'000, 900'000}) {
    const std::vector<std::string> texts = {
        random_words(5'000'001, mean_length), "one word", random_words(1 << 20, mean_length)};
    std::vector<std::string> paths;
    for (const std::string& text : texts) {
      paths.push_back(folder.path(std::to_string(paths.size()) + ".txt"));
      test::write_file(paths.back(), text);
    }
    EXPECT_TRUE(tokenize(folder, paths, tokenizer).ids == expected_ids(tokenizer, texts))
        << mean_length;
  }
}

// Rows of all lengths, some longer than a batch, between .txt files of one piece and of several.
TEST(TokenizeCorpus, WritesTheSameFilesOnAnyNumberOfThreads) {
  const test::TempFolder folder;
  const WordTokenizer tokenizer;
  std::mt19937_64 random(3);
  std::string rows;
  for (int row = 0; row < 4000; ++row) {
    const size_t bytes = row % 1000 == 999 ? 2'500'000 : random() % 2000;
    rows += "{\"text\":\"" + random_words(bytes + 1, 6) + "\"}\n";
  }
  test::write_file(folder.path("1.jsonl"), rows);
  test::write_file(folder.path("2.txt"), random_words(2'500'000, 7));
  test::write_file(folder.path("3.txt"), "a piece");
  test::write_file(folder.path("4.jsonl"), rows);
  std::vector<std::string> first;
  for (const size_t threads : {1, 2, 5}) {
    TextReader reader({folder.path("1.jsonl"),
                       folder.path("2.txt"),
                       folder.path("3.txt"),
                       folder.path("4.jsonl")},
                      {});
    BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
    EXPECT_EQ(tokenize_corpus(reader, tokenizer, writer, nullptr, threads).documents, 8002);
    std::vector<std::string> made;
    for (const char* ending : {".bin", ".idx", ".tokenizer.json"}) {
      made.push_back(test::read_file(folder.path("corpus") + ending));
    }
    first = first.empty() ? made : first;
    EXPECT_TRUE(made == first) << threads;
  }
}

TEST(TokenizeCorpus, HandsOnWhatATokenizerThrowsOnAnotherThread) {
  struct Refusing : WordTokenizer {
    size_t encode_part(std::string_view, TextEnd, std::vector<int32_t>&) const override {
      throw std::runtime_error("cannot encode");
    }
  };
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl"), "{\"text\":\"a\"}\n");
  const Refusing tokenizer;
  {
    TextReader reader({folder.path("a.jsonl")}, {});
    BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, tokenize_corpus(reader, tokenizer, writer)),
                HasSubstr("cannot encode"));
  }
  EXPECT_THAT(folder.files(), ElementsAre("a.jsonl"));
}

TEST(TokenizeCorpus, HoldsOnlyWhatIsNotYetEncoded) {
  const test::TempFolder folder;
  const WordTokenizer tokenizer;
  test::write_file(folder.path("a.txt"), random_words(6'000'000, 50));
  tokenize(folder, {folder.path("a.txt")}, tokenizer);
  EXPECT_LT(tokenizer.longest_call_, (size_t{1} << 20) + 2000);
}

TEST(TokenizeCorpus, EncodesAnEndlessWord) {
  const test::TempFolder folder;
  const WordTokenizer tokenizer;
  const std::string text(3'500'000, 'x');
  test::write_file(folder.path("a.txt"), text);
  EXPECT_EQ(tokenize(folder, {folder.path("a.txt")}, tokenizer).ids,
            expected_ids(tokenizer, {text}));
}

TEST(TokenizeCorpus, RefusesAWordThatOutgrowsTheMemory) {
  const test::TempFolder folder;
  const WordTokenizer tokenizer;
  test::write_file(folder.path("a.txt"), "fine " + std::string(70'000'000, 'x'));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, tokenize(folder, {folder.path("a.txt")}, tokenizer)),
              HasSubstr("a.txt: more than 67,108,864 bytes of a document without a place where the "
                        "tokenizer words can cut it"));
  EXPECT_LT(tokenizer.longest_call_, 70'000'000u);
  EXPECT_THAT(folder.files(), ElementsAre("a.txt"));
}

TEST(TokenizeCorpus, MakesTheDemoCorpusByteForByte) {
  const std::string text = test::find_test_data("corpora/rwkv-lm-demo/demo.jsonl");
  SKIP_WITHOUT(text);
  const test::TempFolder folder;
  const WorldTokenizer world(test::find_test_data("tokenizers/rwkv_vocab_v20230424.txt"));
  const Tokenized out = tokenize(folder, {text}, world);
  EXPECT_EQ(out.result.documents, 182);
  EXPECT_EQ(out.result.tokens, 66833);
  for (const char* ending : {".bin", ".idx"}) {
    EXPECT_TRUE(test::read_file(folder.path("corpus") + ending) ==
                test::read_file(test::find_test_data(
                    std::string("derived/binidx/demo_world_noshuffle") + ending)))
        << ending;
  }
}

TEST(TokenizeCorpus, TokenizesATxtFileOfSeveralPieces) {
  const std::string path = test::find_test_data("corpora/tinyshakespeare/input.txt");
  SKIP_WITHOUT(path);
  const test::TempFolder folder;
  const WorldTokenizer world(test::find_test_data("tokenizers/rwkv_vocab_v20230424.txt"));
  const Tokenized out = tokenize(folder, {path}, world);
  EXPECT_EQ(out.result.text_bytes, 1115394);
  EXPECT_EQ(out.result.tokens, 331658 + 1);
  EXPECT_EQ(std::vector<int64_t>(out.ids.begin(), out.ids.begin() + 5),
            (std::vector<int64_t>{33106, 50075, 59, 11, 40327}));
  EXPECT_TRUE(out.ids == expected_ids(world, {test::read_file(path)}));
}

TEST(TokenizeCorpus, ReportsProgressUpToTheEnd) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.txt"), std::string(3'000'000, 'x'));
  TextReader reader({folder.path("a.txt")}, {});
  const ByteTokenizer tokenizer;
  BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
  std::vector<TokenizeProgress> reports;
  tokenize_corpus(reader, tokenizer, writer, [&](const TokenizeProgress& progress) {
    reports.push_back(progress);
  });
  ASSERT_FALSE(reports.empty());
  EXPECT_EQ(reports.back().bytes_read, 3'000'000u);
  EXPECT_EQ(reports.back().bytes_total, 3'000'000u);
  EXPECT_EQ(reports.back().tokens, 3'000'001);
}

TEST(TokenizeCorpus, RefusesFilesWithoutTextAndLeavesNothing) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl"), "{\"text\":\"\"}\n\n{\"text\":\"\"}\n");
  test::write_file(folder.path("b.txt"), "");
  const ByteTokenizer tokenizer;
  {
    TextReader reader({folder.path("a.jsonl"), folder.path("b.txt")}, {});
    BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, tokenize_corpus(reader, tokenizer, writer)),
                HasSubstr("no document with a token"));
  }
  EXPECT_THAT(folder.files(), ElementsAre("a.jsonl", "b.txt"));
}

TEST(TokenizeCorpus, LeavesNothingWhenARowIsBroken) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl"), "{\"text\":\"fine\"}\nbroken\n");
  const ByteTokenizer tokenizer;
  {
    TextReader reader({folder.path("a.jsonl")}, {});
    BinidxWriter writer(folder.path("corpus"), record_of(tokenizer));
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, tokenize_corpus(reader, tokenizer, writer)),
                HasSubstr("a.jsonl:2:"));
  }
  EXPECT_THAT(folder.files(), ElementsAre("a.jsonl"));
}

}  // namespace
}  // namespace rwkv
