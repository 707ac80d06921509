#include "data/nfc.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <memory>

#include <utf8proc.h>

#include "data/utf8.h"

namespace rwkv {
namespace {

constexpr uint32_t kCodePoints = 0x110000;
// Below U+0300 every character is in form C and none composes with one before it.
constexpr uint32_t kFirstInteresting = 0x300;
constexpr auto kOptions = static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE);

// Appends the full canonical decomposition of one character.
void append_decomposed(uint32_t code, std::vector<int32_t>& out) {
  // No canonical decomposition of one character is longer than 4; utf8proc would say if it were.
  std::array<utf8proc_int32_t, 16> buffer{};
  int bound_class = 0;
  const utf8proc_ssize_t length = utf8proc_decompose_char(
      static_cast<utf8proc_int32_t>(code), buffer.data(), buffer.size(), kOptions, &bound_class);
  out.insert(out.end(), buffer.begin(), buffer.begin() + std::max<utf8proc_ssize_t>(length, 0));
}

int combining_class(int32_t code) {
  return utf8proc_get_property(code)->combining_class;
}

struct NfcTable {
  // Text can be normalised in two parts in front of such a character: its decomposition starts with
  // a starter that composes with nothing before it.
  std::bitset<kCodePoints> starts_segment;
  // The character alone is in form C.
  std::bitset<kCodePoints> is_normal;

  NfcTable() {
    starts_segment.set();
    is_normal.set();
    std::bitset<kCodePoints> is_second;
    std::vector<uint32_t> first(kCodePoints);
    std::vector<int32_t> decomposed;
    for (uint32_t code = kFirstInteresting; code < kCodePoints; ++code) {
      decomposed.clear();
      append_decomposed(code, decomposed);
      if (decomposed.empty()) {
        first[code] = code;
        continue;
      }
      first[code] = static_cast<uint32_t>(decomposed[0]);
      // What stands in a decomposition anywhere but first may compose with what is before it: a few
      // more than truly do (composition exclusions), which costs time and no exactness.
      for (size_t i = 1; i < decomposed.size(); ++i) {
        is_second.set(static_cast<size_t>(decomposed[i]));
      }
      if (decomposed.size() > 1 || first[code] != code) {
        const utf8proc_ssize_t length = utf8proc_normalize_utf32(
            decomposed.data(), static_cast<utf8proc_ssize_t>(decomposed.size()), kOptions);
        is_normal[code] = length == 1 && static_cast<uint32_t>(decomposed[0]) == code;
      }
    }
    for (uint32_t code = kFirstInteresting; code < kCodePoints; ++code) {
      starts_segment[code] =
          !is_second[first[code]] && combining_class(static_cast<int32_t>(first[code])) == 0;
    }
  }
};

// Built at the first use, in some 50 ms.
const NfcTable& nfc_table() {
  static const auto table = std::make_unique<NfcTable>();
  return *table;
}

// Length of the longest prefix of `text` that is ASCII.
size_t ascii_prefix(std::string_view text) {
  size_t i = 0;
  for (; i + 8 <= text.size(); i += 8) {
    uint64_t eight = 0;
    std::memcpy(&eight, text.data() + i, 8);
    if ((eight & 0x8080808080808080) != 0) {
      break;
    }
  }
  while (i < text.size() && static_cast<unsigned char>(text[i]) < 0x80) {
    ++i;
  }
  return i;
}

}  // namespace

std::string_view NfcNormalizer::normalize(std::string_view text) {
  size_t i = ascii_prefix(text);
  if (i == text.size()) {
    return text;
  }
  const NfcTable& table = nfc_table();
  result_.clear();
  size_t copied = 0;         // text[0 .. copied) is in result_, normalised
  size_t segment_start = 0;  // the last character before i that starts a segment
  bool segment_normal = true;
  const auto end_segment = [&] {
    if (!segment_normal) {
      result_.append(text, copied, segment_start - copied);
      append_normalized(text.substr(segment_start, i - segment_start));
      copied = i;
    }
  };
  if (i > 0) {
    segment_start = i - 1;
  }
  while (i < text.size()) {
    const size_t length = utf8_char_length(text.substr(i));
    const uint32_t code = utf8_code_point(text.substr(i));
    if (table.starts_segment[code]) {
      end_segment();
      segment_start = i;
      segment_normal = table.is_normal[code];
    } else {
      segment_normal = false;
    }
    i += length;
    const size_t ascii = ascii_prefix(text.substr(i));
    if (ascii > 0) {
      end_segment();
      i += ascii;
      segment_start = i - 1;
      segment_normal = true;
    }
  }
  end_segment();
  if (copied == 0) {
    return text;
  }
  result_.append(text, copied);
  return result_;
}

void NfcNormalizer::append_normalized(std::string_view segment) {
  code_points_.clear();
  for (size_t i = 0; i < segment.size(); i += utf8_char_length(segment.substr(i))) {
    append_decomposed(utf8_code_point(segment.substr(i)), code_points_);
  }
  // Marks between two starters are ordered by class. (utf8proc_decompose does this too, but by
  // bubble sort: a page of marks on one letter would take it minutes.)
  const auto is_mark = [](int32_t code) { return combining_class(code) != 0; };
  for (auto begin = code_points_.begin(); begin != code_points_.end();) {
    begin = std::find_if(begin, code_points_.end(), is_mark);
    const auto end = std::find_if_not(begin, code_points_.end(), is_mark);
    std::stable_sort(
        begin, end, [](int32_t a, int32_t b) { return combining_class(a) < combining_class(b); });
    begin = end;
  }
  const utf8proc_ssize_t length = utf8proc_normalize_utf32(
      code_points_.data(), static_cast<utf8proc_ssize_t>(code_points_.size()), kOptions);
  for (utf8proc_ssize_t i = 0; i < length; ++i) {
    append_utf8(static_cast<uint32_t>(code_points_[static_cast<size_t>(i)]), result_);
  }
}

}  // namespace rwkv
