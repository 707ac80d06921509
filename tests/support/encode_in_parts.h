// Encoding as a caller with a bounded buffer does it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/tokenizer.h"

namespace rwkv::test {

// Feeds `text` in pieces of `part_bytes`, what was not consumed again in front of the next piece.
inline std::vector<int32_t> encode_in_parts(const Tokenizer& tokenizer,
                                            std::string_view text,
                                            size_t part_bytes) {
  std::vector<int32_t> ids;
  std::string buffer;
  while (!text.empty()) {
    const std::string_view part = text.substr(0, part_bytes);
    text.remove_prefix(part.size());
    buffer += part;
    const auto end = text.empty() ? Tokenizer::TextEnd::kFinal : Tokenizer::TextEnd::kMore;
    buffer.erase(0, tokenizer.encode_part(buffer, end, ids));
  }
  return ids;
}

}  // namespace rwkv::test
