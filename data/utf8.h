// The few questions about UTF-8 that the tokenizers ask. UTF-8 as in RFC 3629: no surrogates, no
// overlong forms, nothing past U+10FFFF.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace rwkv {

// Length in bytes, 1 .. 4, of the well-formed character that `text` starts with; 0 if `text` is
// empty or starts with anything else.
inline size_t utf8_char_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto continues = [&](size_t i) { return (byte(i) & 0xC0) == 0x80; };
  if (text.empty()) {
    return 0;
  }
  const unsigned char lead = byte(0);
  if (lead < 0x80) {
    return 1;
  }
  if (lead >= 0xC2 && lead <= 0xDF) {
    return text.size() >= 2 && continues(1) ? 2 : 0;
  }
  if (lead >= 0xE0 && lead <= 0xEF) {
    const bool whole = text.size() >= 3 && continues(1) && continues(2);
    const bool overlong = whole && lead == 0xE0 && byte(1) < 0xA0;
    const bool surrogate = whole && lead == 0xED && byte(1) >= 0xA0;
    return whole && !overlong && !surrogate ? 3 : 0;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    const bool whole = text.size() >= 4 && continues(1) && continues(2) && continues(3);
    const bool overlong = whole && lead == 0xF0 && byte(1) < 0x90;
    const bool too_large = whole && lead == 0xF4 && byte(1) >= 0x90;
    return whole && !overlong && !too_large ? 4 : 0;
  }
  return 0;
}

// The code point of a well-formed character (utf8_char_length > 0) that `text` starts with.
inline uint32_t utf8_code_point(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<uint8_t>(text[i])); };
  switch (utf8_char_length(text)) {
    case 1:
      return byte(0);
    case 2:
      return (byte(0) & 0x1F) << 6 | (byte(1) & 0x3F);
    case 3:
      return (byte(0) & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    default:
      return (byte(0) & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 |
             (byte(3) & 0x3F);
  }
}

// Length in bytes of the character that `text` starts with, if a terminal shows it; 0 if there is
// no well-formed one, and for what a terminal obeys instead: control characters (C0, tab and line
// feed among them, DEL, C1), and embeddings, overrides and isolates, which put the text around them
// into another order. Texts of strangers' files go through this.
inline size_t shown_char_length(std::string_view text) {
  const size_t length = utf8_char_length(text);
  const uint32_t code = length == 0 ? 0 : utf8_code_point(text);
  const bool is_control = code < 0x20 || (code >= 0x7F && code <= 0x9F);
  const bool reorders = (code >= 0x202A && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
  return is_control || reorders ? 0 : length;
}

// Appends a code point; false, and nothing appended, for a surrogate or a number past U+10FFFF.
inline bool append_utf8(uint32_t code, std::string& text) {
  const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    if (code >= 0xD800 && code <= 0xDFFF) {
      return false;
    }
    put(0xE0 | code >> 12);
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else if (code <= 0x10FFFF) {
    put(0xF0 | code >> 18);
    put(0x80 | (code >> 12 & 0x3F));
    put(0x80 | (code >> 6 & 0x3F));
    put(0x80 | (code & 0x3F));
  } else {
    return false;
  }
  return true;
}

// `text` with U+FFFD for every byte that starts no well-formed character.
inline std::string replace_malformed_utf8(std::string_view text) {
  std::string valid;
  while (!text.empty()) {
    const size_t length = utf8_char_length(text);
    valid.append(length == 0 ? "\xef\xbf\xbd" : text.substr(0, length));
    text.remove_prefix(length == 0 ? 1 : length);
  }
  return valid;
}

}  // namespace rwkv
