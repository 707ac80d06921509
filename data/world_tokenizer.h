// RWKV World: greedy longest match over a fixed vocabulary of byte strings.
// Source: BlinkDL/RWKV-LM RWKV-v5/tokenizer/rwkv_tokenizer.py and rwkv_vocab_v20230424.txt.
//
// The vocabulary file has a line a token, `ID LITERAL LENGTH`, in UTF-8 with LF or CRLF:
//   ID       decimal, 1 or more, each once
//   LITERAL  a Python literal, '...' or "..." (a string: \xHH, \uHHHH and \UHHHHHHHH are code
//            points, UTF-8 encoded afterwards) or with b in front (bytes: \xHH is one byte)
//   LENGTH   of the token in bytes; a mismatch is an error
// All 256 single bytes must be tokens, so that every text can be encoded. Id 0 is not in the file:
// it ends a document, is never produced by encoding and decodes to nothing.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "data/byte_trie.h"
#include "data/tokenizer.h"

namespace rwkv {

class WorldTokenizer final : public Tokenizer {
 public:
  // Throws std::runtime_error "FILE:LINE: ..." for a line that does not follow the format, "FILE:
  // ..." for a file that cannot be read or lacks a single byte.
  explicit WorldTokenizer(const std::string& vocabulary_path);

  using Tokenizer::decode;
  size_t encode_part(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const override;
  void decode(std::span<const int32_t> ids, std::string& text) const override;
  // The largest id + 1, rounded up to a multiple of 64: the World vocabulary's largest id is 65529
  // and its models have 65536 rows. Ids that only the rounding added are not tokens: decode refuses
  // them.
  int64_t vocab_size() const override { return vocab_size_; }
  int64_t num_ids() const override { return static_cast<int64_t>(starts_.size()) - 1; }
  std::optional<int32_t> end_of_document() const override { return 0; }
  bool is_lossless() const override { return true; }
  std::string identity() const override { return identity_; }

 private:
  void parse(const std::string& path, std::string_view content);

  // Token i is pool_[starts_[i] .. starts_[i + 1]); an id without a token is empty, as is id 0.
  std::string pool_;
  std::vector<uint32_t> starts_;
  ByteTrie trie_;
  int64_t vocab_size_ = 0;
  std::string identity_;
};

}  // namespace rwkv
