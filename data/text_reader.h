// Documents out of text files, in constant memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

// A stretch of a document. A .jsonl row is one document and comes as one piece; a .txt file is one
// document and comes in pieces of about a megabyte, the last with ends_document set.
struct TextPiece {
  std::string_view text;  // valid until the next call of next()
  bool ends_document = false;
};

// Reads .txt and .jsonl, each also as .gz or .zst (any number of compressed members or frames), one
// file after the other. The kind is told by the name. Not safe for several threads.
class TextReader {
 public:
  struct Options {
    std::string jsonl_key = "text";  // the key of a row's text
  };
  // Throws std::invalid_argument for a name with another ending (the text lists those known) and
  // for an empty list; std::runtime_error if a file cannot be opened.
  TextReader(std::vector<std::string> paths, Options options);
  ~TextReader();
  TextReader(const TextReader&) = delete;
  TextReader& operator=(const TextReader&) = delete;

  // False when all files are done. Empty rows of a .jsonl file (only white space) are passed over;
  // so are documents without a byte of text.
  // Throws std::runtime_error "FILE:LINE: ..." for a row that is not JSON, not an object, lacks the
  // key, or whose value is not a string or not valid UTF-8; "FILE: ..." for a compressed stream
  // that is cut or corrupt. Invalid UTF-8 in .txt is passed through: a .txt file is bytes.
  bool next(TextPiece& piece);

  // Bytes read so far of the files as they lie on disk, and their total size: for progress lines.
  uint64_t bytes_read() const;
  uint64_t bytes_total() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace rwkv
