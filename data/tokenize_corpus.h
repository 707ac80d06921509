// Text files to a binidx corpus: the work of `rookery tokenize`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <thread>

#include "data/binidx.h"
#include "data/text_reader.h"
#include "data/tokenizer.h"

namespace rwkv {

struct TokenizeProgress {
  uint64_t bytes_read = 0;  // of the files as they lie on disk
  uint64_t bytes_total = 0;
  int64_t tokens = 0;
};

struct TokenizeResult {
  int64_t documents = 0;
  int64_t tokens = 0;      // end-of-document tokens included
  int64_t text_bytes = 0;  // after decompression and, in .jsonl, of the texts alone
};

// What BinidxWriter needs to know of a tokenizer; text_bytes is 0 as yet.
TokenizerRecord record_of(const Tokenizer& tokenizer);

// Encodes every document of `reader` and writes it with `tokenizer`'s end-of-document token behind
// it, then finishes `writer`, which must be made with record_of(tokenizer). The corpus appears
// whole at the end, or not at all.
// Documents that come whole (the rows of .jsonl, .txt files of up to a megabyte) are encoded on
// `threads` threads at once; those in several pieces one piece after the other. The files are the
// same on any number of threads.
// Memory: for each thread a megabyte of text, or one longer row, and its ids; of a document in
// several pieces, a piece (see TextPiece) and what the tokenizer could not yet encode (a document
// of one endless word is held whole, and refused if that is more than 64 MiB). `progress`, if
// given, is called about four times a second, and once at the end. Throws what the reader, the
// tokenizer and the writer throw; std::runtime_error if the files hold no text, or 64 MiB that
// cannot be cut.
TokenizeResult tokenize_corpus(
    TextReader& reader,
    const Tokenizer& tokenizer,
    BinidxWriter& writer,
    const std::function<void(const TokenizeProgress&)>& progress = nullptr,
    size_t threads = std::thread::hardware_concurrency());

}  // namespace rwkv
