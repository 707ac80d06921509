#include "data/bpe_merges.h"

#include <algorithm>
#include <bit>
#include <stdexcept>

namespace rwkv {
namespace {

// Up to here a scan for the lowest rank beats a heap.
constexpr size_t kShortPiece = 48;
constexpr uint32_t kNone = ~uint32_t{0};
// Slots that a pair may be in, from its own place on: ids can be chosen so that all pairs fall on
// one place, and then each would be sought among all. 20B_tokenizer.json needs 16.
constexpr size_t kMaxSlots = 512;

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

BpeMerges::BpeMerges(const std::array<int32_t, 256>& byte_ids,
                     const std::vector<Merge>& merges,
                     const std::vector<Token>& tokens)
    : byte_ids_(byte_ids) {
  const size_t slot_count = std::bit_ceil(std::max<size_t>(2 * merges.size(), 16));
  slots_.resize(slot_count + 1);
  shift_ = 64 - std::countr_zero(slot_count);
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    const size_t index = slot_index(pair_key(merge.left, merge.right));
    if (index == slot_count) {
      throw std::invalid_argument("merge " + std::to_string(rank) +
                                  " has ids that fall on the same place of a table as those of " +
                                  std::to_string(kMaxSlots) +
                                  " merges before it, expected ids that were not chosen for that");
    }
    Slot& slot = slots_[index];
    if (slot.pair != kNoPair) {
      throw std::invalid_argument("merge " + std::to_string(rank) + " repeats merge " +
                                  std::to_string(slot.rank));
    }
    slot = {pair_key(merge.left, merge.right), static_cast<uint32_t>(rank), merge.merged};
  }

  std::vector<ByteTrie::Entry> whole;
  std::vector<int32_t> ids;
  Scratch scratch;
  for (const Token& token : tokens) {
    ids.clear();
    encode(token.bytes, ids, scratch);
    if (ids.size() == 1) {
      whole.push_back({token.bytes, ids[0]});
    }
  }
  whole_ = ByteTrie(std::move(whole));
}

size_t BpeMerges::slot_index(uint64_t pair) const {
  const size_t last = slots_.size() - 1;
  // Multiplication by 2^64 / golden ratio spreads the keys over the high bits.
  const size_t place = (pair * 0x9E3779B97F4A7C15) >> shift_;
  for (size_t step = 0; step < kMaxSlots; ++step) {
    const size_t i = (place + step) & (last - 1);
    if (slots_[i].pair == pair || slots_[i].pair == kNoPair) {
      return i;
    }
  }
  return last;
}

const BpeMerges::Slot& BpeMerges::find(int32_t left, int32_t right) const {
  return slots_[slot_index(pair_key(left, right))];
}

void BpeMerges::encode(std::string_view piece, std::vector<int32_t>& ids, Scratch& scratch) const {
  const ByteTrie::Match match = whole_.longest(piece);
  if (match.value >= 0 && match.length == piece.size()) {
    ids.push_back(match.value);
  } else if (piece.size() <= kShortPiece) {
    merge_short(piece, ids);
  } else {
    merge_long(piece, ids, scratch);
  }
}

void BpeMerges::merge_short(std::string_view piece, std::vector<int32_t>& ids) const {
  std::array<int32_t, kShortPiece> symbols;
  std::array<Slot, kShortPiece> merges;  // [i]: the merge of symbols i and i + 1
  size_t count = piece.size();
  for (size_t i = 0; i < count; ++i) {
    symbols[i] = byte_ids_[static_cast<unsigned char>(piece[i])];
  }
  for (size_t i = 0; i + 1 < count; ++i) {
    merges[i] = find(symbols[i], symbols[i + 1]);
  }
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (merges[i].rank < merges[best].rank) {
        best = i;
      }
    }
    if (merges[best].rank == kNoRank) {
      break;
    }
    symbols[best] = merges[best].merged;
    std::copy(symbols.begin() + best + 2, symbols.begin() + count, symbols.begin() + best + 1);
    std::copy(merges.begin() + best + 1, merges.begin() + count - 1, merges.begin() + best);
    --count;
    if (best > 0) {
      merges[best - 1] = find(symbols[best - 1], symbols[best]);
    }
    if (best + 1 < count) {
      merges[best] = find(symbols[best], symbols[best + 1]);
    }
  }
  ids.insert(ids.end(), symbols.begin(), symbols.begin() + count);
}

// The same with a heap of possible merges over a linked list of symbols, for pieces of any length.
void BpeMerges::merge_long(std::string_view piece,
                           std::vector<int32_t>& ids,
                           Scratch& scratch) const {
  const auto count = static_cast<uint32_t>(piece.size());
  scratch.ids.resize(count);
  scratch.ranks.assign(count, kNoRank);
  scratch.previous.resize(count);
  scratch.next.resize(count);
  scratch.heap.clear();
  using HeapEntry = Scratch::HeapEntry;
  const auto later = [](const HeapEntry& a, const HeapEntry& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
  };
  // Notes the merge of the symbol at `position` with the next one, if there is one.
  const auto offer = [&](uint32_t position) {
    const uint32_t next = scratch.next[position];
    const uint32_t rank =
        next == kNone ? kNoRank : find(scratch.ids[position], scratch.ids[next]).rank;
    scratch.ranks[position] = rank;
    if (rank != kNoRank) {
      scratch.heap.push_back({rank, position});
      std::push_heap(scratch.heap.begin(), scratch.heap.end(), later);
    }
  };
  for (uint32_t i = 0; i < count; ++i) {
    scratch.ids[i] = byte_ids_[static_cast<unsigned char>(piece[i])];
    scratch.previous[i] = i == 0 ? kNone : i - 1;
    scratch.next[i] = i + 1 == count ? kNone : i + 1;
  }
  for (uint32_t i = 0; i + 1 < count; ++i) {
    offer(i);
  }
  while (!scratch.heap.empty()) {
    std::pop_heap(scratch.heap.begin(), scratch.heap.end(), later);
    const HeapEntry entry = scratch.heap.back();
    scratch.heap.pop_back();
    const uint32_t position = entry.position;
    // Left over from before a neighbour was merged away.
    if (scratch.ranks[position] != entry.rank) {
      continue;
    }
    const uint32_t right = scratch.next[position];
    scratch.ids[position] = find(scratch.ids[position], scratch.ids[right]).merged;
    scratch.ranks[right] = kNoRank;
    scratch.next[position] = scratch.next[right];
    if (scratch.next[right] != kNone) {
      scratch.previous[scratch.next[right]] = position;
    }
    offer(position);
    if (scratch.previous[position] != kNone) {
      offer(scratch.previous[position]);
    }
  }
  for (uint32_t i = 0; i != kNone; i = scratch.next[i]) {
    ids.push_back(scratch.ids[i]);
  }
}

}  // namespace rwkv
