// One token a byte: id = byte value, as in rwkv.cpp's tiny test models.
#pragma once

#include "data/tokenizer.h"

namespace rwkv {

// Vocabulary of 256; the byte 0 ends a document. A text that itself contains the byte 0 keeps it:
// it decodes to the byte 0, so that every text comes back as it was.
class ByteTokenizer final : public Tokenizer {
 public:
  using Tokenizer::decode;
  size_t encode_part(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const override;
  void decode(std::span<const int32_t> ids, std::string& text) const override;
  int64_t vocab_size() const override { return 256; }
  std::optional<int32_t> end_of_document() const override { return 0; }
  bool is_lossless() const override { return true; }
  std::string identity() const override { return "bytes"; }
};

}  // namespace rwkv
