// Megatron binidx token files: PREFIX.bin holds the ids of all documents back to back, PREFIX.idx
// where each lies. Little-endian throughout. Layout of the .idx, n items and d document marks:
//   0       9 bytes  "MMIDIDX" and two NULs
//   9       u64      version, 1
//   17      u8       dtype code: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16; floats (6, 7) are refused
//   18      u64      n
//   26      u64      d
//   34      i32[n]   tokens of each item
//   34+4n   i64[n]   byte offset of each item in the .bin, a running sum from 0
//   34+12n  i64[d]   number of the item at which each document starts, then n: d = documents + 1
// Bytes may follow (newer Megatron's modes). The i64 arrays are not aligned.
// A document is one item, or several where it is longer than an item can be. Training and reading
// here run across the borders of both.
// Beside them we write PREFIX.tokenizer.json (see TokenizerRecord); foreign files lack it. It also
// holds "num_tokens", which tells a record left over from another corpus of the same name.
// Source: NVIDIA/Megatron-LM megatron/core/datasets/indexed_dataset.py; BlinkDL/RWKV-LM
// RWKV-v5/src/binidx.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/atomic_file.h"
#include "data/mapped_file.h"

namespace rwkv {

enum class TokenDtype : uint8_t { kU8 = 1, kI8 = 2, kI16 = 3, kI32 = 4, kI64 = 5, kU16 = 8 };

// Which tokenizer made a corpus: the content of PREFIX.tokenizer.json.
struct TokenizerRecord {
  std::string identity;                    // Tokenizer::identity()
  int64_t vocab_size = 0;                  // Tokenizer::vocab_size()
  std::optional<int32_t> end_of_document;  // the id written after each document
  int64_t text_bytes = 0;                  // bytes of text encoded: gives bits per byte
};

// Path of a corpus without its ending .bin or .idx, if it has one.
std::string corpus_prefix(const std::string& path);

// A corpus mapped into memory. Safe to read from several threads.
class BinidxFile {
 public:
  // `prefix` is the path without its ending; a path that ends in .bin or .idx is taken for its
  // prefix. Throws std::runtime_error naming the file, what was found and what was expected if
  // either file is missing, foreign (an old TNTIDX is named as such), of a float type, cut short,
  // without a token, or if sizes, offsets and documents disagree with each other or with the .bin.
  // Reads all of the .idx (20 bytes a document), nothing of the .bin.
  explicit BinidxFile(const std::string& prefix);

  const std::string& prefix() const { return prefix_; }
  TokenDtype dtype() const { return dtype_; }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return num_documents_; }
  // Token positions at which document i starts and ends, 0 <= i < num_documents(); throws
  // std::out_of_range for another i. A foreign file may hold documents without tokens.
  int64_t document_begin(int64_t i) const;
  int64_t document_end(int64_t i) const;
  // Copies ids [begin, begin + out.size()) widened to 64 bits. Throws std::out_of_range with the
  // range asked for and the number of tokens.
  void read(int64_t begin, std::span<int64_t> out) const;
  // What PREFIX.tokenizer.json says, if it is there. Read once, at opening; one that is broken or
  // of another corpus throws std::runtime_error.
  const std::optional<TokenizerRecord>& tokenizer_record() const { return record_; }
  // Tells whether two corpora hold the same tokens, wherever they lie: the number of tokens and a
  // hash of 64 stretches of 4 KiB spread evenly over the .bin, such as "17143 tokens (6c0e...)".
  // Of a corpus of up to 256 KiB that is all of it; in a larger one a change of single tokens can
  // go unseen.
  std::string fingerprint() const;

 private:
  void check_index();
  void check_items(int64_t num_marks);
  int64_t item_begin(int64_t item) const;
  int64_t document_mark(int64_t i) const;

  std::string prefix_;
  MappedFile idx_;
  MappedFile bin_;
  TokenDtype dtype_ = TokenDtype::kU16;
  int64_t num_items_ = 0;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
  std::optional<TokenizerRecord> record_;
};

// Throws std::runtime_error naming the .bin, position, id and vocabulary unless every id is in
// [0, vocab_size). `ids` are those that file.read(begin, ids) gave.
void require_ids_below(int64_t vocab_size,
                       const BinidxFile& file,
                       int64_t begin,
                       std::span<const int64_t> ids);

// Writes a corpus in constant memory but for 4 bytes a document. Nothing appears under the final
// names before finish(); what was written aside is removed if finish() is never reached.
class BinidxWriter {
 public:
  // Ids must be below record.vocab_size; the dtype is u16 if vocab_size <= 65536, else i32.
  // `prefix` as in BinidxFile. Longer documents are written as several items of at most
  // max_item_tokens, the most the format can say. Throws std::invalid_argument for a record that
  // makes no sense; std::runtime_error if PREFIX.bin cannot be written.
  BinidxWriter(const std::string& prefix,
               TokenizerRecord record,
               int64_t max_item_tokens = std::numeric_limits<int32_t>::max());
  ~BinidxWriter();

  // Appends to the current document. Throws std::invalid_argument naming an id out of range.
  void add_tokens(std::span<const int32_t> ids);
  // Ends the current document: appends record.end_of_document if there is one. A document without
  // tokens is not written.
  void end_document();
  // `text_bytes` goes into the side file. Throws std::runtime_error if no document was written,
  // std::logic_error inside a document. Writes all files aside; then removes an older .idx
  // of the same name, and puts its own in place last: at no moment do files of two corpora pass for
  // one, and what cannot be written leaves an older corpus as it was.
  void finish(int64_t text_bytes);

  int64_t num_tokens() const { return num_tokens_; }
  int64_t num_documents() const { return num_documents_; }

 private:
  void write_ids(std::span<const int32_t> ids);
  void end_item();
  void write_index(AtomicFile& file) const;
  void write_record(AtomicFile& file) const;

  std::string prefix_;
  TokenizerRecord record_;
  int64_t max_item_tokens_;
  TokenDtype dtype_;
  AtomicFile bin_;
  std::vector<uint16_t> narrow_;  // ids on their way to a u16 file
  std::vector<int32_t> sizes_;
  std::vector<int64_t> continuing_items_;  // items that do not start a document; rising
  int64_t num_tokens_ = 0;
  int64_t num_documents_ = 0;
  int64_t item_tokens_ = 0;
  bool in_document_ = false;
};

}  // namespace rwkv
