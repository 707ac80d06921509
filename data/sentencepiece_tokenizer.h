// Any sentencepiece model (.model), through libsentencepiece.
//
// A model's own settings decide what comes back. It is lossless if it normalises nothing (identity,
// no dummy prefix, white space kept but written as U+2581), has all 256 byte tokens and a piece for
// the space: so are the models of train_sentencepiece. In a lossless model
//   - what sentencepiece would change becomes byte tokens: bytes that are not UTF-8, the character
//     U+2581 itself, and the byte 0; the text on either side is encoded on its own;
//   - if a line feed is a token of its own and in no other token, a text is encoded line by line,
//     and a line in stretches of at most 64 KiB. That bounds memory and is what lets encode_part
//     cut a text. (Upstream encodes a text in one piece: the same ids, but for the rounding of sums
//     of logarithms over long texts in unigram models, and at the cuts of lines past 64 KiB.)
// In any other model the whole text goes through sentencepiece, as upstream: broken UTF-8 becomes
// U+FFFD, and memory for a text is some hundred bytes a token.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace rwkv {

class SentencepieceTokenizer final : public Tokenizer {
 public:
  // Throws std::runtime_error "FILE: ..." if the file cannot be read, is no sentencepiece model, or
  // has a denormaliser, which decode does not follow.
  explicit SentencepieceTokenizer(const std::string& model_path);
  ~SentencepieceTokenizer() override;

  using Tokenizer::decode;
  // With TextEnd::kMore nothing is consumed where text cannot be cut (see above).
  size_t encode_part(std::string_view text, TextEnd end, std::vector<int32_t>& ids) const override;
  // The tokens' bytes one after the other, so that tokens may be decoded one at a time: <s> and
  // </s> are nothing, and the space that a dummy prefix put in front of a text stays there
  // (upstream's decoder drops it).
  void decode(std::span<const int32_t> ids, std::string& text) const override;
  int64_t vocab_size() const override;
  std::optional<int32_t> end_of_document() const override;
  bool is_lossless() const override;
  std::string identity() const override;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace rwkv
