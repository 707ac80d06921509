#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/protobuf_message.h"
#include "data/sentencepiece_text.h"
#include "data/sentencepiece_tokenizer.h"
#include "data/sentencepiece_training.h"
#include "tests/support/encode_in_parts.h"
#include "tests/support/test_data.h"
#include "tests/support/tokenizer_golden.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

constexpr auto kFinal = Tokenizer::TextEnd::kFinal;
constexpr auto kMore = Tokenizer::TextEnd::kMore;

// Prose of 4,000 lines with words that repeat.
std::string made_up_text(uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::string> words;
  for (int i = 0; i < 400; ++i) {
    std::string word;
    for (size_t n = 1 + random() % 3; n > 0; --n) {
      word += std::string{"bcdfgklmnprst"[random() % 13], "aeiou"[random() % 5]};
    }
    words.push_back(word);
  }
  std::string text;
  for (int line = 0; line < 4000; ++line) {
    for (size_t n = 1 + random() % 10; n > 0; --n) {
      text += words[random() % words.size() * (random() % words.size()) / words.size()];
      text += n == 1 ? ".\n" : random() % 20 == 0 ? "  " : " ";
    }
  }
  return text;
}

class TrainedSentencepiece : public testing::TestWithParam<SentencepieceKind> {
 protected:
  // Training takes a second: once a kind for all tests.
  struct Trained {
    test::TempFolder folder;
    std::unique_ptr<SentencepieceTokenizer> tokenizer;
    explicit Trained(SentencepieceKind kind) {
      test::write_file(folder.path("text.txt"), made_up_text(1));
      train_sentencepiece({.text_files = {folder.path("text.txt")},
                           .model_path = folder.path("a.model"),
                           .vocab_size = 500,
                           .kind = kind});
      tokenizer = std::make_unique<SentencepieceTokenizer>(folder.path("a.model"));
    }
  };
  const Trained& trained() const {
    static const Trained unigram(SentencepieceKind::kUnigram);
    static const Trained bpe(SentencepieceKind::kBpe);
    return GetParam() == SentencepieceKind::kBpe ? bpe : unigram;
  }
  const SentencepieceTokenizer& tokenizer() const { return *trained().tokenizer; }
};

TEST_P(TrainedSentencepiece, IsLosslessForArbitraryBytes) {
  EXPECT_TRUE(tokenizer().is_lossless());
  std::mt19937_64 random(2);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = test::awkward_text(random, random() % 60);
    ASSERT_EQ(tokenizer().decode(tokenizer().encode(text)), text);
  }
  for (int byte = 0; byte < 256; ++byte) {
    const std::string text(1, static_cast<char>(byte));
    EXPECT_EQ(tokenizer().decode(tokenizer().encode(text)), text);
  }
}

TEST_P(TrainedSentencepiece, ReturnsEveryCharacterOfUnicode) {
  std::string text;
  for (uint32_t code = 0; code < 0x110000; code += code < 0x3000 ? 1 : 7) {
    const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
    if (code < 0x800) {
      put(0xC0 | code >> 6);
    } else if (code < 0x10000) {
      put(0xE0 | code >> 12);
      put(0x80 | (code >> 6 & 63));
    } else {
      put(0xF0 | code >> 18);
      put(0x80 | (code >> 12 & 63));
      put(0x80 | (code >> 6 & 63));
    }
    put(0x80 | (code & 63));
    text += code % 5 == 0 ? " " : "";
    text += code % 64 == 0 ? "\n" : "";
  }
  EXPECT_TRUE(tokenizer().decode(tokenizer().encode(text)) == text);
}

TEST_P(TrainedSentencepiece, EncodesTheSameThroughAnyBuffer) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 300; ++i) {
    const std::string text = test::awkward_text(random, random() % 60);
    const auto whole = tokenizer().encode(text);
    for (const size_t part : {1, 2, 3, 20}) {
      ASSERT_EQ(test::encode_in_parts(tokenizer(), text, part), whole) << "parts of " << part;
    }
  }
  // Lines past the limit, with and without places to cut.
  const std::string spaced = made_up_text(4).substr(0, 3000);
  std::string text;
  while (text.size() < 200'000) {
    text += spaced;
  }
  std::replace(text.begin(), text.end(), '\n', ' ');
  text += std::string(200'001, 'x') + "\n";
  for (int i = 0; i < 60'000; ++i) {
    text += "\xE4\xBD\xA0";
  }
  const auto whole = tokenizer().encode(text);
  EXPECT_TRUE(tokenizer().decode(whole) == text);
  EXPECT_EQ(test::encode_in_parts(tokenizer(), text, 10'007), whole);
}

TEST_P(TrainedSentencepiece, HasTheTokensItsHeaderPromises) {
  EXPECT_EQ(tokenizer().vocab_size(), 500);
  ASSERT_TRUE(tokenizer().end_of_document().has_value());
  EXPECT_EQ(tokenizer().decode(std::vector<int32_t>{*tokenizer().end_of_document()}), "");
  EXPECT_EQ(tokenizer().encode("\n").size(), 1u);
  EXPECT_EQ(tokenizer().encode("\n\n").size(), 2u);
  EXPECT_EQ(tokenizer().encode("\xF0\x9F\x98\x80").size(), 4u);
  EXPECT_EQ(tokenizer().encode("\xE2\x96\x81").size(), 3u);
  EXPECT_LT(tokenizer().encode(made_up_text(1)).size(), made_up_text(1).size() / 2);
}

TEST_P(TrainedSentencepiece, IsNotLosslessUnderSettingsThatChangeText) {
  const test::TempFolder folder;
  const std::string model = test::read_file(trained().folder.path("a.model"));
  // A second normalizer_spec (protobuf field 3), which is merged into the first.
  const std::vector<std::pair<std::string, std::string>> settings = {
      {"add_dummy_prefix = true", std::string("\x1A\x02\x18\x01", 4)},
      {"remove_extra_whitespaces = true", std::string("\x1A\x02\x20\x01", 4)},
      {"escape_whitespaces = false", std::string("\x1A\x02\x28\x00", 4)},
  };
  for (const auto& [name, field] : settings) {
    test::write_file(folder.path("b.model"), model + field);
    const SentencepieceTokenizer changed(folder.path("b.model"));
    EXPECT_FALSE(changed.is_lossless()) << name;
    std::vector<int32_t> ids;
    EXPECT_EQ(changed.encode_part("one\ntwo\n", kMore, ids), 0u) << name;
  }
  const std::string text = "  two  spaces ";
  test::write_file(folder.path("b.model"), model + settings[1].second);
  const SentencepieceTokenizer changed(folder.path("b.model"));
  EXPECT_EQ(changed.decode(changed.encode(text)), "two spaces");
}

TEST_P(TrainedSentencepiece, IsTheSameFileForTheSameInput) {
  const test::TempFolder folder;
  test::write_file(folder.path("text.txt"), made_up_text(1));
  const auto train = [&](const std::string& name, int64_t max_lines, uint32_t seed) {
    train_sentencepiece({.text_files = {folder.path("text.txt")},
                         .model_path = folder.path(name),
                         .vocab_size = 500,
                         .kind = GetParam(),
                         .max_lines = max_lines,
                         .seed = seed});
    return test::read_file(folder.path(name));
  };
  EXPECT_TRUE(train("a.model", 1'000'000, 1) == test::read_file(trained().folder.path("a.model")));
  const std::string sampled = train("b.model", 1000, 3);
  EXPECT_TRUE(train("c.model", 1000, 3) == sampled);
  EXPECT_FALSE(train("d.model", 1000, 4) == sampled);
  EXPECT_THAT(folder.files(), ElementsAre("a.model", "b.model", "c.model", "d.model", "text.txt"));
}

TEST_P(TrainedSentencepiece, LearnsFromJsonlRowsAsFromText) {
  const test::TempFolder folder;
  std::string rows;
  std::string lines;
  std::istringstream prose(made_up_text(1));
  for (std::string line; std::getline(prose, line);) {
    rows += "{\"story\": \"\u00e9 " + line + "\"}\n";
    lines += "\xC3\xA9 " + line + "\n";
  }
  test::write_file(folder.path("a.jsonl"), rows);
  test::write_file(folder.path("a.txt"), lines);
  for (const std::string name : {"a.jsonl", "a.txt"}) {
    train_sentencepiece({.text_files = {folder.path(name)},
                         .jsonl_key = "story",
                         .model_path = folder.path(name + ".model"),
                         .vocab_size = 300,
                         .kind = GetParam()});
  }
  EXPECT_TRUE(test::read_file(folder.path("a.jsonl.model")) ==
              test::read_file(folder.path("a.txt.model")));
}

TEST_P(TrainedSentencepiece, SaysTheLargestVocabularyThatACorpusIsEnoughFor) {
  const test::TempFolder folder;
  test::write_file(folder.path("text.txt"), made_up_text(1));
  SentencepieceTraining training{.text_files = {folder.path("text.txt")},
                                 .model_path = folder.path("a.model"),
                                 .vocab_size = 30'000,
                                 .kind = GetParam()};
  const std::string text = THROWN_TEXT(std::invalid_argument, train_sentencepiece(training));
  EXPECT_THAT(text, StartsWith("vocab_size = 30000 is too large"));
  EXPECT_THAT(folder.files(), ElementsAre("text.txt"));
  const size_t number = text.find("enough for ") + 11;
  training.vocab_size = std::stol(text.substr(number));
  EXPECT_GT(training.vocab_size, 300);
  train_sentencepiece(training);
  EXPECT_EQ(SentencepieceTokenizer(folder.path("a.model")).vocab_size(), training.vocab_size);
}

TEST_P(TrainedSentencepiece, SaysIfTheVocabularyIsTooSmallForTheCharacters) {
  const test::TempFolder folder;
  std::string text;
  for (int i = 0; i < 1000; ++i) {
    text += {'\xE4', static_cast<char>(0xB8 + i / 64 % 4), static_cast<char>(0x80 | i % 64)};
    text += i % 20 == 0 ? "\n" : "";
  }
  test::write_file(folder.path("text.txt"), text);
  const std::string message =
      THROWN_TEXT(std::invalid_argument,
                  train_sentencepiece({.text_files = {folder.path("text.txt")},
                                       .model_path = folder.path("a.model"),
                                       .vocab_size = 300,
                                       .kind = GetParam()}));
  EXPECT_THAT(message, HasSubstr("vocab_size = 300 is too small"));
  EXPECT_THAT(message, HasSubstr("or more"));
}

TEST_P(TrainedSentencepiece, TakesTextsThatSentencepieceStumblesOver) {
  const test::TempFolder folder;
  const std::string prose = made_up_text(1);
  std::string text = "\t\t\n\xFF\xFE\n\xE2\x96\x81\xE2\x96\x81 x\n" + std::string(3, '\0') + "\n";
  for (size_t i = 0; i < prose.size(); i += 50) {
    text += prose.substr(i, 50) + "\xE2\x96\x85\t\xE2\x96\x81";
  }
  test::write_file(folder.path("text.txt"), text);
  train_sentencepiece({.text_files = {folder.path("text.txt")},
                       .model_path = folder.path("a.model"),
                       .vocab_size = 400,
                       .kind = GetParam()});
  const SentencepieceTokenizer tokenizer(folder.path("a.model"));
  EXPECT_TRUE(tokenizer.decode(tokenizer.encode(text)) == text);
}

TEST_P(TrainedSentencepiece, LearnsFromWordsAndRunsOfSpacesOfAnyLength) {
  const test::TempFolder folder;
  std::string text = made_up_text(1).substr(0, 8000) + "\n";
  std::mt19937_64 random(1);
  for (const size_t length : {size_t{40'000}, kMaxLineBytes - 1}) {
    std::string word;
    while (word.size() < length) {
      word += static_cast<char>('a' + random() % 26);
    }
    text += word + "\n" + std::string(length, 'a') + "\n" + std::string(length, ' ') + "\n";
  }
  test::write_file(folder.path("text.txt"), text);
  train_sentencepiece({.text_files = {folder.path("text.txt")},
                       .model_path = folder.path("a.model"),
                       .vocab_size = 400,
                       .kind = GetParam()});
  const SentencepieceTokenizer tokenizer(folder.path("a.model"));
  EXPECT_TRUE(tokenizer.decode(tokenizer.encode(text)) == text);
}

TEST_P(TrainedSentencepiece, IsNotLosslessWithoutAPieceForSpaces) {
  const test::TempFolder folder;
  std::string text = made_up_text(1);
  std::erase(text, ' ');
  test::write_file(folder.path("text.txt"), text);
  train_sentencepiece({.text_files = {folder.path("text.txt")},
                       .model_path = folder.path("a.model"),
                       .vocab_size = 400,
                       .kind = GetParam()});
  const SentencepieceTokenizer tokenizer(folder.path("a.model"));
  EXPECT_EQ(tokenizer.is_lossless(), tokenizer.decode(tokenizer.encode("a b")) == "a b");
  EXPECT_FALSE(tokenizer.is_lossless());
}

// A protobuf field with a length.
std::string field(uint32_t number, const std::string& content) {
  MessageWriter writer;
  writer.bytes(number, content);
  return writer.message();
}

TEST_P(TrainedSentencepiece, RefusesPiecesThatAreNoText) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.model");
  const std::string model = test::read_file(trained().folder.path("a.model"));
  test::write_file(path, model + field(1, field(1, std::string("q\0z", 3))));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, SentencepieceTokenizer{path}),
              StartsWith(path + ": "));
}

INSTANTIATE_TEST_SUITE_P(,
                         TrainedSentencepiece,
                         testing::Values(SentencepieceKind::kUnigram, SentencepieceKind::kBpe),
                         [](const auto& kind) {
                           return kind.param == SentencepieceKind::kBpe ? "Bpe" : "Unigram";
                         });

TEST(SentencepieceTraining, SaysIfACorpusIsTooSmallForAnyModel) {
  const test::TempFolder folder;
  test::write_file(folder.path("text.txt"), "one line\n");
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                          train_sentencepiece({.text_files = {folder.path("text.txt")},
                                               .model_path = folder.path("a.model")})),
              HasSubstr("too few for a model; use more text"));
}

TEST(SentencepieceTraining, RefusesWhatCannotBeTrained) {
  const test::TempFolder folder;
  test::write_file(folder.path("empty.txt"), "");
  test::write_file(folder.path("tabs.txt"), "\t\n\t\t\n\n");
  for (const int64_t size : {int64_t{0}, int64_t{299}, int64_t{-5}, int64_t{1} << 40}) {
    EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                            train_sentencepiece({.text_files = {folder.path("empty.txt")},
                                                 .model_path = folder.path("a.model"),
                                                 .vocab_size = size})),
                HasSubstr("expected 300 .. "));
  }
  for (const std::string name : {"empty.txt", "tabs.txt"}) {
    EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                            train_sentencepiece({.text_files = {folder.path(name)},
                                                 .model_path = folder.path("a.model")})),
                HasSubstr(name + " holds no text"));
  }
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          train_sentencepiece({.text_files = {folder.path("absent.txt")},
                                               .model_path = folder.path("a.model")})),
              HasSubstr("absent.txt"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          train_sentencepiece({.text_files = {folder.path("tabs.txt")},
                                               .model_path = "/no/such/folder/a.model"})),
              HasSubstr("/no/such/folder/a.model"));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                          train_sentencepiece({.text_files = {folder.path("empty.txt")},
                                               .model_path = folder.path("a.model"),
                                               .max_lines = 0})),
              HasSubstr("max_lines = 0"));
  EXPECT_THAT(folder.files(), ElementsAre("empty.txt", "tabs.txt"));
}

// A model that upstream trained with its usual settings (scripts/make_tokenizer_golden.py).
TEST(ForeignSentencepiece, GivesUpstreamsIds) {
  const SentencepieceTokenizer tokenizer(test::golden("dummy_prefix.model"));
  const auto golden = test::tokenizer_golden();
  for (const auto& row : golden["texts"]) {
    const auto text = row["text"].get<std::string>();
    EXPECT_EQ(tokenizer.encode(text), row["sentencepiece"].get<std::vector<int32_t>>()) << text;
  }
}

TEST(ForeignSentencepiece, IsNotLosslessAndCannotBeCut) {
  const SentencepieceTokenizer tokenizer(test::golden("dummy_prefix.model"));
  EXPECT_FALSE(tokenizer.is_lossless());
  EXPECT_EQ(tokenizer.vocab_size(), 400);
  EXPECT_EQ(tokenizer.end_of_document(), 2);
  std::vector<int32_t> ids;
  EXPECT_EQ(tokenizer.encode_part("one\ntwo\n", kMore, ids), 0u);
  EXPECT_TRUE(ids.empty());
  // The dummy prefix shows: tokens decode one by one to what they are.
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("hello")), " hello");
  // What the model has no token for, and broken UTF-8, is <unk>.
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("\xE4\xBD\xA0")), "  \xE2\x81\x87 ");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("\xFF")), "  \xE2\x81\x87 ");
}

TEST(SentencepieceTokenizer, RefusesToDecodeWhatIsNoToken) {
  const SentencepieceTokenizer tokenizer(test::golden("dummy_prefix.model"));
  for (const int32_t id : {-1, 400}) {
    const std::string text =
        THROWN_TEXT(std::invalid_argument, (void)tokenizer.decode(std::vector<int32_t>{id}));
    EXPECT_THAT(text, HasSubstr("token id " + std::to_string(id)));
    EXPECT_THAT(text, HasSubstr("0 .. 399"));
  }
}

TEST(SentencepieceTokenizer, RefusesFilesThatAreNoModels) {
  const test::TempFolder folder;
  const std::string model = test::read_file(test::golden("dummy_prefix.model"));
  ASSERT_GT(model.size(), 1000u);
  for (const std::string& content : {std::string(),
                                     std::string("plain text, no model"),
                                     std::string(100, '\0'),
                                     std::string(100, '\xFF'),
                                     model.substr(0, 20),
                                     model.substr(0, model.size() / 2),
                                     model.substr(0, model.size() - 1)}) {
    test::write_file(folder.path("a.model"), content);
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, SentencepieceTokenizer{folder.path("a.model")}),
                StartsWith(folder.path("a.model") + ": "));
  }
  // A denormaliser with a map, appended as protobuf field 5 of the model and field 2 of the spec.
  test::write_file(folder.path("a.model"), model + "\x2A\x03\x12\x01x");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, SentencepieceTokenizer{folder.path("a.model")}),
              HasSubstr("denormaliser"));
}

// A table of replacements as normaliser: the size of its trie, the trie, texts.
std::string with_replacements(const std::string& model,
                              const std::vector<uint32_t>& units,
                              const std::string& texts) {
  std::vector<uint32_t> numbers = units;
  numbers.insert(numbers.begin(), static_cast<uint32_t>(4 * units.size()));
  const std::string map =
      std::string(reinterpret_cast<const char*>(numbers.data()), 4 * numbers.size()) + texts;
  return model + field(3, field(2, map));
}

TEST(SentencepieceTokenizer, RefusesATableOfReplacementsThatReachesOutsideItself) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.model");
  const std::string model = test::read_file(test::golden("dummy_prefix.model"));
  const auto refusal = [&](const std::vector<uint32_t>& units, const std::string& texts) {
    test::write_file(path, with_replacements(model, units, texts));
    return THROWN_TEXT(std::runtime_error, SentencepieceTokenizer{path});
  };
  const std::string texts("x\0", 2);
  std::vector<uint32_t> units(512, 0);
  // "a" becomes the text at 0: its children start at unit 256, where the leaf stands.
  units['a'] = 'a' | 0x100 | (256 ^ 'a') << 10;
  units[256] = uint32_t{1} << 31;
  test::write_file(path, with_replacements(model, units, texts));
  EXPECT_EQ(SentencepieceTokenizer(path).encode("a"), SentencepieceTokenizer(path).encode("x"));

  std::vector<uint32_t> broken = units;
  broken['b'] = 'b' | 512 << 10;
  EXPECT_THAT(refusal(broken, texts), HasSubstr("points to unit 610 of 512"));
  broken = units;
  broken[0] = uint32_t{1} << 31 | 512 << 10;
  EXPECT_THAT(refusal(broken, texts), HasSubstr("points to unit 2097664 of 512"));
  broken = units;
  broken[256] |= 2;
  EXPECT_THAT(refusal(broken, texts), HasSubstr("a text outside its 2 bytes"));
  EXPECT_THAT(refusal(units, "x"), HasSubstr("texts that do not end"));
  EXPECT_THAT(refusal(units, ""), HasSubstr("texts that do not end"));
  EXPECT_THAT(refusal({}, texts), HasSubstr("no trie"));
  EXPECT_THAT(refusal({units.begin(), units.begin() + 100}, texts), HasSubstr("of 100"));
}

TEST(SentencepieceTokenizer, RefusesMoreThanAnyModelHolds) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.model");
  const std::string model = test::read_file(test::golden("dummy_prefix.model"));
  const auto refusal = [&](const std::string& content) {
    test::write_file(path, content);
    return THROWN_TEXT(std::runtime_error, SentencepieceTokenizer{path});
  };
  // The library builds a tree as deep as the longest piece, by recursion.
  const auto piece = [](size_t bytes) { return field(1, field(1, std::string(bytes, 'a'))); };
  test::write_file(path, model + piece(4096));
  EXPECT_EQ(SentencepieceTokenizer(path).vocab_size(), 401);
  EXPECT_THAT(refusal(model + piece(4097)),
              HasSubstr("a.model: piece 400 has 4,097 bytes, expected at most 4,096; "));
  EXPECT_THAT(refusal(model + piece(150'000)), HasSubstr("piece 400 has 150,000 bytes"));
  // What the unknown token decodes to.
  EXPECT_THAT(refusal(model + field(2, field(44, std::string(4097, 'a')))),
              HasSubstr("unknown token decodes to 4,097 bytes, expected at most 4,096"));
  std::string empty_pieces;
  for (int i = 0; i < (1 << 20) + 1; ++i) {
    empty_pieces += std::string("\x0A\0", 2);
  }
  EXPECT_THAT(refusal(empty_pieces), HasSubstr("holds more than 1,048,576 pieces"));
  // "a" becomes a text of so many bytes.
  const auto replacing = [&](size_t bytes) {
    std::vector<uint32_t> units(512, 0);
    units['a'] = 'a' | 0x100 | (256 ^ 'a') << 10;
    units[256] = uint32_t{1} << 31;
    return with_replacements(model, units, std::string(bytes, 'x') + '\0');
  };
  test::write_file(path, replacing(256));
  EXPECT_EQ(SentencepieceTokenizer(path).encode("a"),
            SentencepieceTokenizer(path).encode(std::string(256, 'x')));
  EXPECT_THAT(refusal(replacing(257)), HasSubstr("longer than 256 bytes"));
}

TEST(LineParts, AreLinesAndLineFeeds) {
  EXPECT_EQ(next_line_part("one\ntwo", kMore), 3u);
  EXPECT_EQ(next_line_part("\n\ntwo", kMore), 1u);
  EXPECT_EQ(next_line_part("two", kMore), 0u);
  EXPECT_EQ(next_line_part("two", kFinal), 3u);
  EXPECT_EQ(next_line_part("", kFinal), 0u);
}

TEST(LineParts, EndAtTheLimitWhereverTheTextGoesOn) {
  const std::string words = std::string(kMaxLineBytes - 4, 'x') + " yyyyyyy";
  EXPECT_EQ(next_line_part(words, kMore), kMaxLineBytes - 4);
  EXPECT_EQ(next_line_part(std::string(kMaxLineBytes, 'x'), kMore), 0u);
  EXPECT_EQ(next_line_part(std::string(kMaxLineBytes, 'x'), kFinal), kMaxLineBytes);
  EXPECT_EQ(next_line_part(std::string(kMaxLineBytes + 1, 'x'), kMore), kMaxLineBytes);
  const std::string face = std::string(kMaxLineBytes - 2, 'x') + "\xF0\x9F\x98\x80";
  EXPECT_EQ(next_line_part(face, kMore), kMaxLineBytes - 2);
  EXPECT_EQ(next_line_part(std::string(kMaxLineBytes, 'x') + "\n", kMore), kMaxLineBytes);
  EXPECT_EQ(next_line_part(std::string(" ").append(kMaxLineBytes, 'x'), kMore), kMaxLineBytes);
  const std::string full = std::string("a b").append(kMaxLineBytes - 3, 'x');
  EXPECT_EQ(next_line_part(full + "\n", kMore), kMaxLineBytes);
  EXPECT_EQ(next_line_part(full + "x\n", kMore), 1u);
  EXPECT_EQ(next_line_part("abc defg", kFinal, 7), 3u);
  EXPECT_EQ(next_line_part("abcdefgh", kFinal, 7), 7u);
}

}  // namespace
}  // namespace rwkv
