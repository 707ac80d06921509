#include "train/bench/bench_tokenizer.h"

#include <array>
#include <cmath>
#include <random>

#include "data/tokenizer_registry.h"

namespace rwkv {
namespace {

constexpr size_t kDocumentBytes = 4000;
constexpr size_t kNumWords = 5000;

constexpr std::array<const char*, 40> kSyllables = {
    "the", "an",  "in", "er", "of", "to", "re", "and", "on",  "al",  "is", "en",   "at", "or",
    "it",  "es",  "ed", "ti", "as", "st", "le", "con", "ing", "ra",  "li", "ment", "se", "com",
    "ter", "per", "de", "ly", "un", "i",  "a",  "ver", "pro", "ble", "y",  "sion"};

// Words made of one syllable at first, then of two, three and four.
std::vector<std::string> invented_words(std::mt19937_64& random) {
  std::vector<std::string> words;
  for (size_t i = 0; i < kNumWords; ++i) {
    const size_t syllables = i < 40 ? 1 : 2 + random() % 3;
    std::string word = i < 40 ? kSyllables[i] : "";
    for (size_t j = word.empty() ? 0 : 1; j < syllables; ++j) {
      word += kSyllables[random() % kSyllables.size()];
    }
    words.push_back(word);
  }
  return words;
}

// What follows a word: the next in the sentence, or the sentence's end.
const char* gap(std::mt19937_64& random) {
  constexpr std::array<const char*, 16> kGaps = {
      " ", " ", " ", " ", " ", " ", " ", " ", " ", " ", " ", " ", ", ", ", ", ". ", ".\n\n"};
  return kGaps[random() % kGaps.size()];
}

std::string invented_document(const std::vector<std::string>& words, std::mt19937_64& random) {
  std::string text;
  bool capital = true;
  while (text.size() < kDocumentBytes) {
    // Uniform in the logarithm of the rank: a word's frequency falls as one over its rank.
    const double share = static_cast<double>(random() >> 11) * 0x1p-53;
    const auto rank = static_cast<size_t>(std::pow(kNumWords, share)) - 1;
    std::string word = random() % 50 == 0 ? std::to_string(random() % 2000) : words[rank];
    if (capital && word[0] >= 'a') {
      word[0] = static_cast<char>(word[0] - 'a' + 'A');
    }
    const std::string after = gap(random);
    capital = after[0] == '.';
    text += word + after;
  }
  text.resize(kDocumentBytes);
  return text;
}

}  // namespace

BenchRow bench_tokenizer(const std::string& spec,
                         std::span<const std::string> documents,
                         int64_t repeats) {
  const Spread load = time_repeated(0, repeats, [&] { open_tokenizer(spec); });
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(spec);
  std::vector<int32_t> ids;
  int64_t tokens = 0;
  const Spread encode = time_repeated(1, repeats, [&] {
    tokens = 0;
    for (const std::string& document : documents) {
      ids.clear();
      tokenizer->encode_part(document, Tokenizer::TextEnd::kFinal, ids);
      tokens += std::ssize(ids);
    }
  });
  double bytes = 0;
  for (const std::string& document : documents) {
    bytes += static_cast<double>(document.size());
  }
  return {.what = "tokenizer " + spec,
          .ms = encode,
          .figures = {{"mb_per_s", bytes / 1e6 / (encode.median / 1000)},
                      {"tokens", static_cast<double>(tokens)},
                      {"load_ms", load.median}},
          .conditions = {{"threads", 1}}};
}

std::vector<std::string> read_documents(TextReader& reader) {
  std::vector<std::string> documents;
  std::string text;
  for (TextPiece piece; reader.next(piece);) {
    text += piece.text;
    if (piece.ends_document) {
      documents.push_back(std::move(text));
      text.clear();
    }
  }
  return documents;
}

std::vector<std::string> invented_documents(int64_t total_bytes) {
  std::mt19937_64 random(1);
  const std::vector<std::string> words = invented_words(random);
  std::vector<std::string> documents;
  for (int64_t bytes = 0; bytes < total_bytes; bytes += std::ssize(documents.back())) {
    documents.push_back(invented_document(words, random));
  }
  return documents;
}

}  // namespace rwkv
