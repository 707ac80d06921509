// GPT-NeoX 20B: byte-level BPE, read from a Hugging Face tokenizers file (20B_tokenizer.json).
// Source: the file itself, and huggingface/tokenizers for what its fields mean.
//
// Encoding, in this order:
//   1. added tokens with "normalized": false (<|endoftext|>, <|padding|>) are cut out of the raw
//      text wherever they stand: text from strangers can thus name the end of a document
//   2. each stretch between them is brought to Unicode form C (by the tables of utf8proc; those of
//      upstream are of Unicode 9 and leave combining marks added since in another order)
//   3. added tokens with "normalized": true (runs of 2 to 24 spaces) are cut out, leftmost, longest
//   4. the rest is split by GPT-2's rule into words, numbers, punctuation and white space
//   5. each piece is merged byte pair by byte pair (bpe_merges.h)
// Upstream takes only valid Unicode. Here, a byte that is not part of a well-formed UTF-8 character
// becomes the token of that byte, and the text on either side of it is encoded on its own. The 20B
// vocabulary has no token for the 13 bytes that no UTF-8 text holds (C0, C1, F5 .. FF): such a byte
// becomes the tokens of U+FFFD. That and form C are why the tokenizer is not lossless.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace rwkv {

class BpeTokenizer final : public Tokenizer {
 public:
  // Throws std::runtime_error "FILE: ..." if the file cannot be read, is not JSON, asks for what
  // this class does not do (another normalizer, dropout ...) or contradicts itself (a merge of
  // unknown tokens, one id for two tokens ...).
  explicit BpeTokenizer(const std::string& json_path);
  ~BpeTokenizer() override;

  using Tokenizer::decode;
  // With TextEnd::kMore the text is cut in front of a line feed, a carriage return or a lone space
  // that follows a character other than white space: nothing in steps 1 to 5 sees across such a
  // place.
  size_t encode_part(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const override;
  // Added tokens decode to their text, <|endoftext|> included.
  void decode(std::span<const int32_t> ids, std::string& text) const override;
  int64_t vocab_size() const override;  // 50277 for 20B_tokenizer.json
  // The id of <|endoftext|> (0 in 20B_tokenizer.json), if the file has that token.
  std::optional<int32_t> end_of_document() const override;
  bool is_lossless() const override { return false; }
  std::string identity() const override;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace rwkv
