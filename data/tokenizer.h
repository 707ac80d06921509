// Text to token ids and back: the interface that every tokenizer keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

// Ids are 0 .. vocab_size() - 1. All methods are const and safe to call from several threads.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // Appends to `ids` the ids of a prefix of `text` and returns the length of that prefix in bytes.
  // With TextEnd::kFinal the prefix is all of `text`. With TextEnd::kMore it is as much as encodes
  // the same whatever follows (possibly nothing), so that a text of any length can be encoded
  // through a bounded buffer: feed the rest again in front of what comes next.
  // Allocates only to grow `ids` and, in some tokenizers, scratch once a call: nothing per token.
  // `text` may be any bytes. Throws std::invalid_argument only where the tokenizer cannot represent
  // them (none of ours).
  enum class TextEnd { kFinal, kMore };
  virtual size_t encode_part(std::string_view text,
                             TextEnd end,
                             std::vector<int32_t>& ids) const = 0;

  // Appends the bytes of the tokens. The bytes may end inside a UTF-8 character.
  // Throws std::invalid_argument naming the id and the range if an id is not a token.
  virtual void decode(std::span<const int32_t> ids, std::string& text) const = 0;

  // Number of rows a model's embedding needs: 1 + the largest id this tokenizer can name (World
  // rounds that up, as its models do; the ids added are not tokens).
  virtual int64_t vocab_size() const = 0;
  // 1 + the largest id that stands for text: a model that writes text must not choose others.
  virtual int64_t num_ids() const { return vocab_size(); }
  // The id that ends a document: 0 in World, 20B and bytes; </s> in sentencepiece, if it has one.
  virtual std::optional<int32_t> end_of_document() const = 0;
  // True if decode(encode(x)) == x for arbitrary bytes x, broken UTF-8 included.
  virtual bool is_lossless() const = 0;
  // Kind and content, as "world:4f1d..." (kind, then XXH3-128 of the vocabulary in hex; "bytes" has
  // no vocabulary): two tokenizers with one identity give the same ids for every text.
  virtual std::string identity() const = 0;

  std::vector<int32_t> encode(std::string_view text) const {
    std::vector<int32_t> ids;
    encode_part(text, TextEnd::kFinal, ids);
    return ids;
  }
  std::string decode(std::span<const int32_t> ids) const {
    std::string text;
    decode(ids, text);
    return text;
  }
};

}  // namespace rwkv
