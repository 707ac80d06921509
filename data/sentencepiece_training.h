// Trains a sentencepiece model on text files.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace rwkv {

enum class SentencepieceKind { kUnigram, kBpe };

struct SentencepieceTraining {
  std::vector<std::string> text_files;  // .txt, .jsonl, each also .gz or .zst, as in TextReader
  std::string jsonl_key = "text";       // key of the text in .jsonl rows
  std::string model_path;               // what to write, for example "bible.model"
  int64_t vocab_size = 4096;  // 300 or more: 256 byte tokens and the special ones included
  SentencepieceKind kind = SentencepieceKind::kUnigram;
  int64_t max_lines = 1'000'000;  // lines sampled from longer corpora
  uint32_t seed = 1;
};

// The model that results is lossless: identity normalisation, no dummy prefix, spaces kept, newline
// a token of its own, byte fallback for characters it has not seen. The same input gives the same
// file. The file appears whole or not at all.
// Throws std::invalid_argument for a vocab_size out of range (also when the corpus is too small for
// it: the text says the largest that would do); std::runtime_error for unreadable input.
void train_sentencepiece(const SentencepieceTraining& training);

}  // namespace rwkv
