// Byte-pair encoding of one piece of text: the merge table and how it is applied.
// Source: Sennrich et al. 2016, arXiv:1508.07909; tie-breaking as in Hugging Face tokenizers.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/byte_trie.h"

namespace rwkv {

// Start from single bytes; as long as two neighbours have a merge, apply the merge of lowest rank,
// leftmost first. Immutable once built: safe to read from several threads.
class BpeMerges {
 public:
  struct Merge {  // its rank is its index
    int32_t left = 0;
    int32_t right = 0;
    int32_t merged = 0;
  };
  struct Token {
    std::string_view bytes;
    int32_t id = 0;
  };
  // Reused from piece to piece, so that no piece allocates; one per thread.
  struct Scratch {
    struct HeapEntry {
      uint32_t rank = 0;
      uint32_t position = 0;
    };
    std::vector<int32_t> ids;
    std::vector<uint32_t> ranks;
    std::vector<uint32_t> previous;
    std::vector<uint32_t> next;
    std::vector<HeapEntry> heap;
  };

  BpeMerges() = default;
  // `byte_ids` are the ids of the 256 single bytes. `tokens` are all that merging may give.
  // Throws std::invalid_argument if a pair is merged twice, or if hundreds of pairs collide.
  BpeMerges(const std::array<int32_t, 256>& byte_ids,
            const std::vector<Merge>& merges,
            const std::vector<Token>& tokens);

  // Appends the ids of `piece`, which is shorter than 2^32 bytes. Linear in its length times the
  // logarithm.
  void encode(std::string_view piece, std::vector<int32_t>& ids, Scratch& scratch) const;

 private:
  struct Slot {
    uint64_t pair = kNoPair;  // left << 32 | right
    uint32_t rank = kNoRank;
    int32_t merged = 0;
  };
  static constexpr uint64_t kNoPair = ~uint64_t{0};
  static constexpr uint32_t kNoRank = ~uint32_t{0};

  size_t slot_index(uint64_t pair) const;
  const Slot& find(int32_t left, int32_t right) const;
  void merge_short(std::string_view piece, std::vector<int32_t>& ids) const;
  void merge_long(std::string_view piece, std::vector<int32_t>& ids, Scratch& scratch) const;

  std::array<int32_t, 256> byte_ids_{};
  // Open addressing, at most half full, over all but the last slot, which stays empty: the slot of
  // pairs that are not merged and find none nearer.
  std::vector<Slot> slots_;
  int shift_ = 0;
  // Tokens that merging their own bytes gives back whole: most pieces of a text are such.
  ByteTrie whole_;
};

}  // namespace rwkv
