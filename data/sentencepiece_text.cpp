#include "data/sentencepiece_text.h"

#include <algorithm>

#include "data/utf8.h"

namespace rwkv {
namespace {

constexpr std::string_view kSpaceSymbol = "\xE2\x96\x81";  // U+2581

}  // namespace

size_t next_line_part(std::string_view text, Tokenizer::TextEnd end, size_t max_bytes) {
  const std::string_view window = text.substr(0, max_bytes);
  const size_t line_feed = window.find('\n');
  if (line_feed != std::string_view::npos) {
    return std::max<size_t>(line_feed, 1);
  }
  if (text.size() <= max_bytes) {
    return end == Tokenizer::TextEnd::kFinal ? text.size() : 0;
  }
  if (text[max_bytes] == '\n') {
    return max_bytes;
  }
  const size_t space = window.rfind(' ');
  if (space != std::string_view::npos && space > 0) {
    return space;
  }
  // A character has at most three continuation bytes; more of them are broken text, cut anywhere.
  size_t cut = max_bytes;
  while (cut > max_bytes - 3 && (static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) {
    --cut;
  }
  return cut;
}

size_t plain_prefix(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const size_t length = utf8_char_length(text.substr(i));
    if (length == 0 || text[i] == '\0' || text.substr(i, length) == kSpaceSymbol) {
      break;
    }
    i += length;
  }
  return i;
}

size_t special_prefix(std::string_view text) {
  return text.starts_with(kSpaceSymbol) ? kSpaceSymbol.size() : 1;
}

}  // namespace rwkv
