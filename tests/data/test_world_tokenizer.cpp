#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/byte_trie.h"
#include "data/world_tokenizer.h"
#include "tests/support/encode_in_parts.h"
#include "tests/support/test_data.h"
#include "tests/support/tokenizer_golden.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

constexpr const char* kVocabulary = "tokenizers/rwkv_vocab_v20230424.txt";

// Reading the vocabulary takes a moment: once for all tests.
const WorldTokenizer& world() {
  static const WorldTokenizer tokenizer(test::find_test_data(kVocabulary));
  return tokenizer;
}

#define SKIP_WITHOUT_WORLD() SKIP_WITHOUT(test::find_test_data(kVocabulary))

TEST(WorldTokenizer, GivesTheReferenceIds) {
  SKIP_WITHOUT_WORLD();
  EXPECT_THAT(world().encode("I'll 'd test блабла 以下は、]) -> <|endoftext|><|padding|> int"),
              ElementsAre(74,
                          5229,
                          274,
                          101,
                          32223,
                          5092,
                          27980,
                          2795,
                          27980,
                          33,
                          10399,
                          10258,
                          10139,
                          10079,
                          1682,
                          3463,
                          295,
                          125,
                          25258,
                          7588,
                          2318,
                          125,
                          790,
                          125,
                          49520,
                          125,
                          63,
                          21888));
  EXPECT_THAT(world().encode("\n\n"), ElementsAre(261));
}

TEST(WorldTokenizer, GivesUpstreamsIdsForAwkwardTexts) {
  SKIP_WITHOUT_WORLD();
  const auto golden = test::tokenizer_golden();
  ASSERT_GE(golden["texts"].size(), 50u);
  for (const auto& row : golden["texts"]) {
    const auto text = row["text"].get<std::string>();
    EXPECT_EQ(world().encode(text), row["world"].get<std::vector<int32_t>>()) << text;
  }
  for (const auto& row : golden["bytes"]) {
    const std::string text = test::from_hex(row["hex"]);
    EXPECT_EQ(world().encode(text), row["world"].get<std::vector<int32_t>>()) << row["hex"];
  }
}

TEST(WorldTokenizer, EncodesEverySingleByteAsItsNumberPlusOne) {
  SKIP_WITHOUT_WORLD();
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(1, static_cast<char>(byte));
    EXPECT_THAT(world().encode(text), ElementsAre(byte + 1));
    EXPECT_EQ(world().decode(std::vector<int32_t>{byte + 1}), text);
  }
}

TEST(WorldTokenizer, EveryTokenEncodesToItself) {
  SKIP_WITHOUT_WORLD();
  for (int32_t id = 1; id < 65530; ++id) {
    ASSERT_THAT(world().encode(world().decode(std::vector<int32_t>{id})), ElementsAre(id));
  }
}

TEST(WorldTokenizer, ReturnsArbitraryBytesAsTheyWere) {
  SKIP_WITHOUT_WORLD();
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) {
    const std::string text = test::awkward_text(random, random() % 100);
    ASSERT_EQ(world().decode(world().encode(text)), text);
  }
  EXPECT_TRUE(world().is_lossless());
}

TEST(WorldTokenizer, EncodesTheSameThroughAnyBuffer) {
  SKIP_WITHOUT_WORLD();
  std::mt19937_64 random(2);
  for (int i = 0; i < 300; ++i) {
    const std::string text =
        test::awkward_text(random, random() % 200) + std::string(random() % 200, '=');
    const auto whole = world().encode(text);
    for (const size_t part : {1, 2, 3, 7, 64, 150}) {
      ASSERT_EQ(test::encode_in_parts(world(), text, part), whole) << "parts of " << part;
    }
  }
}

TEST(WorldTokenizer, HoldsBackOnlyWhatALongerTokenCouldClaim) {
  SKIP_WITHOUT_WORLD();
  // No token starts with "\x01a": the first byte is settled. "th" could go on as "the".
  std::vector<int32_t> ids;
  EXPECT_EQ(world().encode_part("\x01th", Tokenizer::TextEnd::kMore, ids), 1u);
  EXPECT_THAT(ids, ElementsAre(2));
}

TEST(WorldTokenizer, SaysWhatTheModelsAssume) {
  SKIP_WITHOUT_WORLD();
  EXPECT_EQ(world().vocab_size(), 65536);
  EXPECT_EQ(world().end_of_document(), 0);
  EXPECT_EQ(world().decode(std::vector<int32_t>{0}), "");
  // From `xxhsum -H2` over the file.
  EXPECT_EQ(world().identity(), "world:3dbb81dc73286a8b1a1c64f6d023795a");
}

TEST(WorldTokenizer, RefusesToDecodeWhatIsNoToken) {
  SKIP_WITHOUT_WORLD();
  for (const int32_t id : {-1, 65530, 65536}) {
    const std::string text =
        THROWN_TEXT(std::invalid_argument, (void)world().decode(std::vector<int32_t>{id}));
    EXPECT_THAT(text, HasSubstr("token id " + std::to_string(id)));
    EXPECT_THAT(text, HasSubstr("0 .. 65529"));
  }
}

class VocabularyFile : public testing::Test {
 protected:
  // The 256 single bytes and then `lines`, from line 257 on.
  std::string file_with(const std::string& lines) {
    std::string content;
    for (int byte = 0; byte < 256; ++byte) {
      const char* digits = "0123456789abcdef";
      content +=
          std::to_string(byte + 1) + " b'\\x" + digits[byte / 16] + digits[byte % 16] + "' 1\n";
    }
    return write(content + lines);
  }
  std::string write(const std::string& content) {
    test::write_file(folder_.path("vocab.txt"), content);
    return folder_.path("vocab.txt");
  }
  std::string error_of(const std::string& path) {
    return THROWN_TEXT(std::runtime_error, WorldTokenizer{path});
  }

  test::TempFolder folder_;
};

TEST_F(VocabularyFile, UnderstandsPythonLiterals) {
  const std::vector<std::pair<std::string, std::string>> literals = {
      {R"('a b' 3)", "a b"},
      {R"("it's" 4)", "it's"},
      {R"('\x80' 2)", "\xC2\x80"},
      {R"(b'\x80\xff' 2)", "\x80\xFF"},
      {R"('\u4f60\n' 4)", "\xE4\xBD\xA0\n"},
      {R"('\U0001F600' 4)", "\xF0\x9F\x98\x80"},
      {R"('\'\"\\\t\r' 5)", "'\"\\\t\r"},
      {"'\xC3\xA9' 2", "\xC3\xA9"},
      {R"("\"\'" 2)", "\"'"},
  };
  for (const auto& [literal, bytes] : literals) {
    const WorldTokenizer tokenizer(file_with("257 " + literal + "\n"));
    EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{257}), bytes) << literal;
    EXPECT_THAT(tokenizer.encode(bytes), ElementsAre(257)) << literal;
  }
}

TEST_F(VocabularyFile, TakesCrLfAndAMissingLastLineEnd) {
  const WorldTokenizer tokenizer(file_with("257 'ab' 2\r\n258 'cd' 2"));
  EXPECT_THAT(tokenizer.encode("abcd"), ElementsAre(257, 258));
}

TEST_F(VocabularyFile, RoundsItsSizeUpToAMultipleOf64) {
  EXPECT_EQ(WorldTokenizer(file_with("")).vocab_size(), 320);
  EXPECT_EQ(WorldTokenizer(file_with("319 'ab' 2\n")).vocab_size(), 320);
  EXPECT_EQ(WorldTokenizer(file_with("320 'ab' 2\n")).vocab_size(), 384);
}

TEST_F(VocabularyFile, MayLeaveIdsOutWhichAreThenNoTokens) {
  const WorldTokenizer tokenizer(file_with("260 'ab' 2\n"));
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("xaby")), "xaby");
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, (void)tokenizer.decode(std::vector<int32_t>{258})),
              HasSubstr("258"));
}

TEST_F(VocabularyFile, NamesTheLineOfEveryMistake) {
  const std::vector<std::pair<std::string, std::string>> mistakes = {
      {"257 'ab' 3", "2 bytes, but the line says 3"},
      {"257 'ab'", "expected `ID LITERAL LENGTH`"},
      {"257", "expected `ID LITERAL LENGTH`"},
      {"", "expected `ID LITERAL LENGTH`"},
      {"x 'ab' 2", "the id is \"x\""},
      {"0 'ab' 2", "the id is \"0\""},
      {"-1 'ab' 2", "the id is \"-1\""},
      {"99999999999 'ab' 2", "the id is"},
      {"257 'ab' 2x", "the length is \"2x\""},
      {"257 '' 0", "the length is \"0\""},
      {"257 ab 2", "expected '...'"},
      {"257 'ab\" 2", "expected '...'"},
      {"257 ' 1", "expected '...'"},
      {"257 'a'b' 3", "unescaped '"},
      {"257 '\\q' 1", "unknown escape \\q"},
      {"257 'ab\\' 3", "unknown escape \\"},
      {"257 b'\\u0041' 1", "unknown escape \\u"},
      {"257 '\\x4' 1", "2 hexadecimal digits"},
      {"257 '\\u00g0' 1", "4 hexadecimal digits"},
      {"257 '\\ud800' 3", "no Unicode character"},
      {"257 '\xFF' 1", "not valid UTF-8"},
      {"257 b'\xC3\xA9' 2", "not ASCII"},
      {"257 'a' 1", "token 257 repeats the bytes of line 98"},
      {"98 'ab' 2", "token 98 repeats the id of line 98"},
  };
  for (const auto& [line, reason] : mistakes) {
    const std::string path = file_with(line + "\n");
    const std::string text = error_of(path);
    EXPECT_THAT(text, StartsWith(path + ":257: ")) << line;
    EXPECT_THAT(text, HasSubstr(reason)) << line;
  }
}

TEST_F(VocabularyFile, MustHoldAllSingleBytes) {
  EXPECT_THAT(error_of(write("")), HasSubstr("no token is the byte 0"));
  EXPECT_THAT(error_of(write("1 'ab' 2\n")), HasSubstr("no token is the byte 0"));
  EXPECT_THAT(error_of(folder_.path("absent.txt")), HasSubstr("absent.txt"));
}

TEST(ByteTrie, FindsTheLongestEntryAndSaysIfMoreTextCouldChangeIt) {
  const ByteTrie trie({{"a", 1}, {"abcd", 2}, {"b", 3}, {std::string_view("\0\0", 2), 4}});
  const auto longest = [&](std::string_view text) {
    const ByteTrie::Match match = trie.longest(text);
    return std::tuple(match.value, match.length, match.open);
  };
  EXPECT_EQ(longest("abcde"), std::tuple(2, 4u, false));
  EXPECT_EQ(longest("abcx"), std::tuple(1, 1u, false));
  EXPECT_EQ(longest("abc"), std::tuple(1, 1u, true));
  EXPECT_EQ(longest("abcd"), std::tuple(2, 4u, false));
  EXPECT_EQ(longest("b"), std::tuple(3, 1u, false));
  EXPECT_EQ(longest("x"), std::tuple(-1, 0u, false));
  EXPECT_EQ(longest(""), std::tuple(-1, 0u, true));
  EXPECT_EQ(longest(std::string_view("\0\0\0", 3)), std::tuple(4, 2u, false));
  EXPECT_EQ(ByteTrie().longest("a").value, -1);
}

TEST(ByteTrie, AgreesWithASearchThroughAllEntries) {
  std::mt19937_64 random(3);
  std::vector<std::string> keys;
  for (int i = 0; i < 3000; ++i) {
    std::string key;
    for (size_t n = 1 + random() % 6; n > 0; --n) {
      key += static_cast<char>(random() % (i % 2 == 0 ? 3 : 256));
    }
    keys.push_back(key);
  }
  std::sort(keys.begin(), keys.end());
  keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
  std::vector<ByteTrie::Entry> entries;
  for (size_t i = 0; i < keys.size(); ++i) {
    entries.push_back({keys[i], static_cast<int32_t>(i)});
  }
  const ByteTrie trie(entries);
  for (int i = 0; i < 3000; ++i) {
    std::string text;
    for (size_t n = random() % 8; n > 0; --n) {
      text += static_cast<char>(random() % (i % 2 == 0 ? 3 : 256));
    }
    int32_t expected = -1;
    for (size_t k = 0; k < keys.size(); ++k) {
      if (text.starts_with(keys[k]) &&
          (expected < 0 || keys[k].size() > keys[static_cast<size_t>(expected)].size())) {
        expected = static_cast<int32_t>(k);
      }
    }
    ASSERT_EQ(trie.longest(text).value, expected);
  }
}

TEST(ByteTrie, RefusesEmptyAndRepeatedEntries) {
  EXPECT_THROW(ByteTrie({{"", 1}}), std::invalid_argument);
  EXPECT_THROW(ByteTrie({{"a", -1}}), std::invalid_argument);
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, ByteTrie({{"a", 1}, {"a", 2}})),
              HasSubstr("twice"));
}

}  // namespace
}  // namespace rwkv
