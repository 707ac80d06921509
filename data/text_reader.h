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
// file after the other. The kind is told by the name. A UTF-8 byte order mark at the start of a
// file says how the file is encoded and is no part of its text: it is left out. Lines of .jsonl may
// end in CR LF. Memory is a few megabytes, or a few times the longest row
// (of numbers, 14 times). Not safe for several
// threads.
class TextReader {
 public:
  struct Options {
    std::string jsonl_key = "text";  // the key of a row's text
    // Bytes a row may have, at most 4,294,967,000 (simdjson's own limit is 2^32 - 1): without a
    // limit, a file without line ends would fill the memory. A row of this size that is made for it
    // takes 0.9 GB.
    uint64_t max_row_bytes = uint64_t{64} << 20;
  };
  // Throws std::invalid_argument for a name with another ending (the text lists those known), for
  // an empty list and for a max_row_bytes out of range; std::runtime_error if a file cannot be
  // opened, or is a folder or a pipe.
  TextReader(std::vector<std::string> paths, Options options);
  ~TextReader();
  TextReader(const TextReader&) = delete;
  TextReader& operator=(const TextReader&) = delete;

  // False when all files are done. Empty rows of a .jsonl file (only white space) are passed over;
  // so are documents without a byte of text.
  // Throws std::runtime_error "FILE:LINE: ..." (lines counted after decompression, from 1) for a
  // row that is not JSON (a number that fits neither 64 bits nor a double counts as such), not an
  // object, too long, lacks the key or has it twice, or whose value is not a string or not valid
  // UTF-8; "FILE: ..." for a compressed stream that is cut or corrupt. Invalid UTF-8 in .txt is
  // passed through: a .txt file is bytes. After an error the reader is of no more use.
  bool next(TextPiece& piece);

  // The file that the last piece is of.
  const std::string& path() const;

  // Bytes read so far of the files as they lie on disk, and their total size: for progress lines.
  uint64_t bytes_read() const;
  uint64_t bytes_total() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace rwkv
