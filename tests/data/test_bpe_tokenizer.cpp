#include <thread>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/bpe_merges.h"
#include "data/bpe_tokenizer.h"
#include "data/nfc.h"
#include "tests/support/encode_in_parts.h"
#include "tests/support/test_data.h"
#include "tests/support/tokenizer_golden.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

constexpr const char* kFile = "tokenizers/20B_tokenizer.json";

const BpeTokenizer& neox() {
  static const BpeTokenizer tokenizer(test::find_test_data(kFile));
  return tokenizer;
}

#define SKIP_WITHOUT_NEOX() SKIP_WITHOUT(test::find_test_data(kFile))

TEST(BpeTokenizer, GivesTheReferenceIds) {
  SKIP_WITHOUT_NEOX();
  EXPECT_THAT(neox().encode("Hello world"), ElementsAre(12092, 1533));
  EXPECT_THAT(neox().encode(" Hello world"), ElementsAre(24387, 1533));
  EXPECT_THAT(neox().encode("\n"), ElementsAre(187));
  EXPECT_THAT(neox().encode("\n\n"), ElementsAre(535));
  EXPECT_THAT(neox().encode("\n\nA:"), ElementsAre(187, 187, 34, 27));
  EXPECT_THAT(neox().encode("a  b"), ElementsAre(66, 50276, 67));
}

TEST(BpeTokenizer, GivesUpstreamsIdsForAwkwardTexts) {
  SKIP_WITHOUT_NEOX();
  const auto golden = test::tokenizer_golden();
  ASSERT_GE(golden["texts"].size(), 50u);
  for (const auto& row : golden["texts"]) {
    const auto text = row["text"].get<std::string>();
    const auto ids = row["neox"].get<std::vector<int32_t>>();
    EXPECT_EQ(neox().encode(text), ids) << text;
    EXPECT_EQ(neox().decode(ids), row["neox_decoded"].get<std::string>()) << text;
  }
}

TEST(BpeTokenizer, EncodesTheSameThroughAnyBuffer) {
  SKIP_WITHOUT_NEOX();
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000; ++i) {
    const std::string text = test::awkward_text(random, random() % 60);
    const auto whole = neox().encode(text);
    for (const size_t part : {1, 2, 3, 7, 20}) {
      ASSERT_EQ(test::encode_in_parts(neox(), text, part), whole)
          << "parts of " << part << ": " << text;
    }
  }
}

TEST(BpeTokenizer, CutsProseCloseToTheEndOfTheBuffer) {
  SKIP_WITHOUT_NEOX();
  std::vector<int32_t> ids;
  EXPECT_EQ(neox().encode_part("one two three", Tokenizer::TextEnd::kMore, ids), 7u);
  EXPECT_EQ(neox().encode_part("one\ntwo", Tokenizer::TextEnd::kMore, ids), 3u);
  EXPECT_EQ(neox().encode_part("one\r\ntwo", Tokenizer::TextEnd::kMore, ids), 3u);
  // After the space a second one may follow, and in front of it stands white space.
  EXPECT_EQ(neox().encode_part("one ", Tokenizer::TextEnd::kMore, ids), 0u);
  EXPECT_EQ(neox().encode_part("one \n two", Tokenizer::TextEnd::kMore, ids), 0u);
}

TEST(BpeTokenizer, EncodesBrokenUtf8ByteByByte) {
  SKIP_WITHOUT_NEOX();
  const auto token_of = [](char byte) {
    const auto ids = neox().encode(std::string(1, byte));
    EXPECT_EQ(ids.size(), 1u);
    return ids[0];
  };
  EXPECT_THAT(neox().encode("a\x80z"), ElementsAre(66, token_of('\x80'), 91));
  EXPECT_THAT(neox().encode("\xE4\xBD"), ElementsAre(token_of('\xE4'), token_of('\xBD')));
  EXPECT_THAT(neox().encode("\xED\xA0\x80"),
              ElementsAre(token_of('\xED'), token_of('\xA0'), token_of('\x80')));
  EXPECT_EQ(neox().decode(neox().encode("caf\xE9 \xF0\x9F\x98")), "caf\xE9 \xF0\x9F\x98");
  // No UTF-8 text holds the byte FF, and so the vocabulary has no token for it.
  EXPECT_EQ(neox().encode("\xFF"), neox().encode("\xEF\xBF\xBD"));
  EXPECT_FALSE(neox().is_lossless());
}

TEST(BpeTokenizer, ReturnsNormalisedTextAsItWas) {
  SKIP_WITHOUT_NEOX();
  std::mt19937_64 random(4);
  for (int i = 0; i < 1000; ++i) {
    const std::string once = neox().decode(neox().encode(test::awkward_text(random, 60)));
    ASSERT_EQ(neox().decode(neox().encode(once)), once);
  }
}

TEST(BpeTokenizer, SaysWhatTheModelsAssume) {
  SKIP_WITHOUT_NEOX();
  EXPECT_EQ(neox().vocab_size(), 50277);
  EXPECT_EQ(neox().end_of_document(), 0);
  EXPECT_THAT(neox().identity(), testing::MatchesRegex("neox:[0-9a-f]{32}"));
}

TEST(BpeTokenizer, RefusesToDecodeWhatIsNoToken) {
  SKIP_WITHOUT_NEOX();
  for (const int32_t id : {-1, 50277}) {
    const std::string text =
        THROWN_TEXT(std::invalid_argument, (void)neox().decode(std::vector<int32_t>{id}));
    EXPECT_THAT(text, HasSubstr("token id " + std::to_string(id)));
    EXPECT_THAT(text, HasSubstr("0 .. 50276"));
  }
}

TEST(BpeTokenizer, GivesTheSameIdsFromSeveralThreads) {
  SKIP_WITHOUT_NEOX();
  std::mt19937_64 random(5);
  const std::string text = test::awkward_text(random, 20000);
  const auto expected = neox().encode(text);
  std::vector<std::vector<int32_t>> ids(4);
  std::vector<std::thread> threads;
  for (auto& result : ids) {
    threads.emplace_back([&] { result = neox().encode(text); });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  EXPECT_THAT(ids, testing::Each(expected));
}

// A small file that is right, to break in one place at a time.
class BpeFileChecks : public testing::Test {
 protected:
  BpeFileChecks() {
    using Json = nlohmann::json;
    Json vocabulary = Json::object();
    int id = 0;
    for (int code = 33; code < 0x144; ++code) {
      const bool in_alphabet = code <= 126 || (code >= 161 && code <= 172) ||
                               (code >= 174 && code <= 255) || code >= 256;
      if (in_alphabet) {
        std::string name;
        if (code < 128) {
          name = static_cast<char>(code);
        } else {
          name = {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 63))};
        }
        vocabulary[name] = id++;
      }
    }
    vocabulary["ab"] = id++;
    json_ = {{"version", "1.0"},
             {"truncation", nullptr},
             {"padding", nullptr},
             {"added_tokens", Json::array()},
             {"normalizer", {{"type", "NFC"}}},
             {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
             {"post_processor", nullptr},
             {"decoder", {{"type", "ByteLevel"}}},
             {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", {"a b"}}}}};
    json_["added_tokens"].push_back({{"id", 257},
                                     {"content", "<end>"},
                                     {"normalized", false},
                                     {"single_word", false},
                                     {"lstrip", false},
                                     {"rstrip", false},
                                     {"special", true}});
  }

  std::string write(const std::string& content) {
    test::write_file(folder_.path("t.json"), content);
    return folder_.path("t.json");
  }
  std::string error() {
    const std::string path = write(json_.dump());
    const std::string text = THROWN_TEXT(std::runtime_error, BpeTokenizer{path});
    EXPECT_THAT(text, StartsWith(path + ": "));
    return text;
  }

  test::TempFolder folder_;
  nlohmann::json json_;
};

TEST_F(BpeFileChecks, TakesTheFileThatTheOthersBreak) {
  const BpeTokenizer tokenizer(write(json_.dump()));
  EXPECT_THAT(tokenizer.encode("ab<end>"), ElementsAre(256, 257));
  EXPECT_EQ(tokenizer.vocab_size(), 258);
  EXPECT_EQ(tokenizer.end_of_document(), std::nullopt);
  using Json = nlohmann::json;
  json_["model"]["merges"] = Json::array({Json::array({"a", "b"})});
  EXPECT_THAT(BpeTokenizer(write(json_.dump())).encode("ab"), ElementsAre(256));
}

TEST_F(BpeFileChecks, RefusesWhatIsNoTokenizersFile) {
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BpeTokenizer{write("")}), HasSubstr("is not JSON"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BpeTokenizer{write("{\"model\": ")}),
              HasSubstr("is not JSON"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BpeTokenizer{write("[1]")}),
              HasSubstr("expected an object"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BpeTokenizer{folder_.path("absent.json")}),
              HasSubstr("absent.json"));
}

TEST_F(BpeFileChecks, RefusesWhatAFileOfThisKindNeverHolds) {
  const auto refusal = [&](const std::string& content) {
    return THROWN_TEXT(std::runtime_error, BpeTokenizer{write(content)});
  };
  const std::string deep = std::string(200000, '[') + std::string(200000, ']');
  EXPECT_THAT(refusal("{\"truncation\": " + deep + "}"), HasSubstr("deeper than 64 levels"));
  EXPECT_THAT(refusal(R"({"model": {"vocab": {"a": 1, "a": 2}}})"),
              HasSubstr("has the key \"a\" twice"));
  // A text that the JSON library would quote whole.
  EXPECT_THAT(
      refusal("{\"" + std::string(1 << 20, 'x')),
      testing::AllOf(HasSubstr("is not JSON: broken at byte"), testing::SizeIs(testing::Lt(300))));
  EXPECT_THAT(refusal(R"({"version": 1e999})"), HasSubstr("a number is too large"));
  std::filesystem::resize_file(write("{}"), (32 << 20) + 1);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BpeTokenizer{folder_.path("t.json")}),
              HasSubstr("has 33,554,433 bytes, expected at most 33,554,432"));
}

TEST_F(BpeFileChecks, RefusesSettingsItDoesNotFollow) {
  const nlohmann::json right = json_;
  const std::vector<std::pair<std::string, nlohmann::json>> settings = {
      {"/normalizer", nullptr},
      {"/normalizer/type", "NFKC"},
      {"/pre_tokenizer/type", "Whitespace"},
      {"/pre_tokenizer/add_prefix_space", true},
      {"/pre_tokenizer/use_regex", false},
      {"/post_processor", {{"type", "TemplateProcessing"}}},
      {"/decoder/type", "WordPiece"},
      {"/model/type", "WordPiece"},
      {"/model/dropout", 0.1},
      {"/model/unk_token", "<unk>"},
      {"/model/continuing_subword_prefix", "##"},
      {"/model/end_of_word_suffix", "</w>"},
      {"/model/byte_fallback", true},
      {"/model/ignore_merges", true},
      {"/truncation", {{"max_length", 8}}},
      {"/padding", {{"length", 8}}},
      {"/added_tokens/0/lstrip", true},
      {"/added_tokens/0/rstrip", true},
      {"/added_tokens/0/single_word", true},
  };
  for (const auto& [pointer, value] : settings) {
    json_ = right;
    json_[nlohmann::json::json_pointer(pointer)] = value;
    EXPECT_THAT(error(), HasSubstr("expected")) << pointer;
  }
}

TEST_F(BpeFileChecks, RefusesContradictions) {
  const nlohmann::json right = json_;
  const std::vector<std::tuple<std::string, nlohmann::json, std::string>> mistakes = {
      {"/model/vocab", {}, "model.vocab"},
      {"/model/vocab/ab", 1, "has the id 1, which another token has already"},
      {"/model/vocab/ab", -1, "expected a whole number"},
      {"/model/vocab/ab", "1", "expected a whole number"},
      {"/model/vocab/ab", 1.5, "expected a whole number"},
      {"/model/vocab/ab", 99999999, "expected a whole number"},
      {"/model/vocab/a b", 300, "byte-level alphabet"},
      {"/model/merges", "a b", "expected a list"},
      {"/model/merges", {"ab"}, "expected \"LEFT RIGHT\""},
      {"/model/merges", {7}, "expected \"LEFT RIGHT\""},
      {"/model/merges", {"a c"}, "model.merges[0] needs the token \"ac\""},
      {"/model/merges", {"a b", "ab xy"}, "model.merges[1] needs the token \"xy\""},
      {"/model/merges", {"a b", "a b"}, "merge 1 repeats merge 0"},
      {"/added_tokens", "none", "expected a list"},
      {"/added_tokens/0", 5, "expected an object"},
      {"/added_tokens/0/id", 3, "which another token has already"},
      {"/added_tokens/0/content", "", "expected a text"},
      {"/added_tokens/0/content", "ab", "but model.vocab gives it 256"},
      {"/added_tokens/0/normalized", nullptr, "expected true or false"},
      {"/added_tokens/1", json_["added_tokens"][0], "in the list already"},
  };
  for (const auto& [pointer, value, reason] : mistakes) {
    json_ = right;
    json_[nlohmann::json::json_pointer(pointer)] = value;
    EXPECT_THAT(error(), HasSubstr(reason)) << pointer;
  }
  json_ = right;
  json_["model"]["vocab"].erase("a");
  json_["model"]["merges"] = nlohmann::json::array();
  EXPECT_THAT(error(), HasSubstr("lacks a token for the byte 97"));
}

TEST_F(BpeFileChecks, TakesManyAddedTokensInTime) {
  nlohmann::json entry = json_["added_tokens"][0];
  for (int i = 0; i < 60'000; ++i) {
    entry["id"] = 300 + i;
    entry["content"] = std::string(150, 'z') + std::to_string(100'000 + i);
    json_["added_tokens"].push_back(entry);
  }
  const std::string path = write(json_.dump());
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(BpeTokenizer(path).vocab_size(), 60'300);
  // Each compared with each takes 20 s.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
}

TEST_F(BpeFileChecks, CutsNowhereThatAnAddedTokenReachesAcross) {
  for (const std::string end : {"\n", "\r"}) {
    const std::string token = "x y" + end + "z";
    json_["added_tokens"][0]["content"] = token;
    const BpeTokenizer tokenizer(write(json_.dump()));
    std::mt19937_64 random(6);
    for (int i = 0; i < 300; ++i) {
      std::string text;
      for (size_t n = random() % 12; n > 0; --n) {
        text += std::vector<std::string>{token, "x", " ", "y", end, "z"}[random() % 6];
      }
      ASSERT_EQ(test::encode_in_parts(tokenizer, text, 2), tokenizer.encode(text)) << text;
    }
  }
}

TEST(BpeMerges, GiveLongPiecesWhatTheyGiveShortOnes) {
  // The rule itself, written plainly.
  std::array<int32_t, 256> byte_ids{};
  for (int32_t byte = 0; byte < 256; ++byte) {
    byte_ids[static_cast<size_t>(byte)] = byte;
  }
  const std::vector<BpeMerges::Merge> merges = {{'a', 'a', 256},
                                                {'a', 'b', 257},
                                                {256, 'b', 258},
                                                {256, 256, 259},
                                                {257, 257, 260},
                                                {'b', 'a', 261},
                                                {260, 'a', 262},
                                                {259, 258, 263}};
  const auto plainly = [&](const std::string& text) {
    std::vector<int32_t> ids(text.begin(), text.end());
    for (;;) {
      size_t best_rank = merges.size();
      size_t best = 0;
      for (size_t i = 0; i + 1 < ids.size(); ++i) {
        for (size_t rank = 0; rank < best_rank; ++rank) {
          if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
            best_rank = rank;
            best = i;
          }
        }
      }
      if (best_rank == merges.size()) {
        return ids;
      }
      ids[best] = merges[best_rank].merged;
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
  };
  const BpeMerges table(byte_ids, merges, {{"aa", 256}, {"ab", 257}, {"aab", 258}});
  BpeMerges::Scratch scratch;
  std::mt19937_64 random(7);
  for (int i = 0; i < 3000; ++i) {
    std::string text;
    for (size_t n = 1 + random() % 120; n > 0; --n) {
      text += "aaabbc"[random() % 6];
    }
    std::vector<int32_t> ids;
    table.encode(text, ids, scratch);
    ASSERT_EQ(ids, plainly(text)) << text;
  }
}

TEST(BpeMerges, RefuseIdsChosenToCollide) {
  // All in one of 4096 places of the table, for 2000 of them take 4096.
  std::vector<BpeMerges::Merge> merges;
  for (int32_t right = 0; merges.size() < 2000; ++right) {
    if (static_cast<uint64_t>(right) * 0x9E3779B97F4A7C15 >> 52 == 0) {
      merges.push_back({0, right, 1});
    }
  }
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, BpeMerges({}, merges, {})),
              HasSubstr("merge 512 has ids that fall on the same place"));
  merges.resize(512);
  std::array<int32_t, 256> byte_ids{};
  byte_ids['b'] = merges.back().right;
  std::vector<int32_t> ids;
  BpeMerges::Scratch scratch;
  BpeMerges(byte_ids, merges, {}).encode("ab", ids, scratch);
  EXPECT_THAT(ids, ElementsAre(1));
}

TEST(BpeMerges, TakeAPieceOfAMegabyteInSeconds) {
  SKIP_WITHOUT_NEOX();
  std::string text;
  std::mt19937_64 random(8);
  for (size_t i = 0; i < (1 << 20); ++i) {
    text += static_cast<char>('a' + random() % 26);
  }
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(neox().decode(neox().encode(text)), text);
  // Quadratic work would take minutes.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST(Nfc, NormalisesLongRunsOfMarksInTime) {
  // U+0323 (class 220) belongs before U+0301 (class 230).
  std::string text = "e";
  std::string expected = "\xE1\xBA\xB9";  // U+1EB9, e with the first dot below
  constexpr size_t kMarks = 200'000;
  for (size_t i = 0; i < kMarks; ++i) {
    text += "\xCC\x81\xCC\xA3";
  }
  for (size_t i = 1; i < kMarks; ++i) {
    expected += "\xCC\xA3";
  }
  for (size_t i = 0; i < kMarks; ++i) {
    expected += "\xCC\x81";
  }
  NfcNormalizer nfc;
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(nfc.normalize(text) == expected);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(30));
}

TEST(Nfc, LeavesNormalTextWhereItIs) {
  NfcNormalizer nfc;
  const std::string text = "caf\xC3\xA9 \xE4\xBD\xA0 \xEA\xB0\x81 plain";
  EXPECT_EQ(nfc.normalize(text).data(), text.data());
}

}  // namespace
}  // namespace rwkv
