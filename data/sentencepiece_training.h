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
  int64_t max_lines = 1'000'000;  // 1 or more: lines sampled from longer corpora
  uint32_t seed = 1;
};

// The model that results is lossless, if the text has a space in it: identity normalisation, no
// dummy prefix, spaces kept, newline a token of its own, byte fallback for characters it has not
// seen; <unk> is 0, </s> is 1, there is no <s>. It learns from lines; from longer ones than 4096
// bytes in parts, cut in front of a space if there is one. The same input gives the same file, on
// any number of processors. The file appears whole or not at all. Memory is about 25 times the
// sampled text for kUnigram and 10 times for kBpe. Sets the log level of sentencepiece for the
// process, to errors only. Throws std::invalid_argument for a vocab_size out of range (also when
// the corpus is too small for it: the text says the largest that would do); std::runtime_error for
// unreadable input.
void train_sentencepiece(const SentencepieceTraining& training);

}  // namespace rwkv
