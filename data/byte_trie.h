// A set of byte strings, each with a number, that finds the longest one at the start of a text.
//
// A double-array trie (Aoe, 1989): a node's child for byte c lies at unit base ^ c, and counts only
// if the label there is c. A step is one load of 8 bytes, so the 65,529 World tokens walk in 1.6
// MB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace rwkv {

// Immutable once built: safe to read from several threads.
class ByteTrie {
 public:
  struct Entry {
    std::string_view bytes;  // not empty; needed only while the trie is built
    int32_t value = 0;       // 0 or more
  };
  struct Match {
    int32_t value = -1;  // of the longest entry that `text` starts with; -1 if there is none
    size_t length = 0;   // of that entry in bytes
    // True if `text` ended while a longer entry was still possible.
    bool open = false;
  };

  ByteTrie() = default;
  // Throws std::invalid_argument for an empty or repeated byte string and for a negative value;
  // std::length_error if the trie would need 2^24 units (128 MB) or more.
  explicit ByteTrie(std::vector<Entry> entries);

  Match longest(std::string_view text) const {
    Match match;
    uint32_t base = root_base_;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto byte = static_cast<unsigned char>(text[i]);
      const Unit& unit = units_[base ^ byte];
      if ((unit.base_and_label & 0xFF) != byte) {
        return match;
      }
      base = unit.base_and_label >> 8;
      if (unit.value >= 0) {
        match.value = unit.value;
        match.length = i + 1;
      }
    }
    match.open = base != kDeadBlock;
    return match;
  }

 private:
  // A unit that no node took can be arrived at by byte 0, and does no harm: it has no value, and
  // its base is that of a node without children.
  struct Unit {
    uint32_t base_and_label = 0;  // base << 8 | label
    int32_t value = -1;
  };
  // Units 0 .. 255 carry labels that match no byte: the base of nodes without children.
  static constexpr uint32_t kDeadBlock = 0;

  class Builder;

  std::vector<Unit> units_ = dead_block();
  uint32_t root_base_ = kDeadBlock;

  static std::vector<Unit> dead_block();
};

}  // namespace rwkv
