// How text is cut for a lossless sentencepiece model: the trainer learns from the same stretches
// that the tokenizer encodes.
#pragma once

#include <cstddef>
#include <string_view>

#include "data/tokenizer.h"

namespace rwkv {

// The longest line that is encoded in one piece.
inline constexpr size_t kMaxLineBytes = size_t{64} << 10;

// Length of the part of `text` up to the next cut: a single line feed, or text without any, cut
// after `max_bytes` (4 or more) at the latest, in front of the last space if there is one, else
// between two characters. 0 if `text` is empty or, with TextEnd::kMore, if that depends on what
// follows.
size_t next_line_part(std::string_view text,
                      Tokenizer::TextEnd end,
                      size_t max_bytes = kMaxLineBytes);

// Length of the longest prefix of `text` that sentencepiece gives back as it was.
size_t plain_prefix(std::string_view text);
// Number of bytes, 1 or more, at the start of `text` that become byte tokens; `text` is not empty
// and has no plain prefix.
size_t special_prefix(std::string_view text);

// Calls plain(text) for each stretch that sentencepiece gives back as it was, and byte(b) for each
// byte that it would change: of broken UTF-8, of U+2581, which stands for a space, and 0.
template <typename Plain, typename Byte>
void split_plain_text(std::string_view text, Plain plain, Byte byte) {
  while (!text.empty()) {
    if (const size_t length = plain_prefix(text); length > 0) {
      plain(text.substr(0, length));
      text.remove_prefix(length);
      continue;
    }
    const size_t length = special_prefix(text);
    for (const char special : text.substr(0, length)) {
      byte(static_cast<unsigned char>(special));
    }
    text.remove_prefix(length);
  }
}

}  // namespace rwkv
