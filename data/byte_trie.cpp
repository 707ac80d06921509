#include "data/byte_trie.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <deque>
#include <stdexcept>
#include <string>

namespace rwkv {
namespace {

constexpr uint32_t kBlockUnits = 256;
constexpr size_t kMaxUnits = size_t{1} << 24;  // a base has 24 bits

}  // namespace

// Places nodes breadth first, so that the top of the trie, which every walk passes, lies together.
class ByteTrie::Builder {
 public:
  explicit Builder(std::vector<Entry>& entries) : entries_(entries), units_(dead_block()) {}

  uint32_t build() {
    std::deque<Node> queue;
    const uint32_t root_base = place_children({0, entries_.size(), 0}, queue);
    while (!queue.empty()) {
      const Node node = queue.front();
      queue.pop_front();
      size_t begin = node.begin;
      if (entries_[begin].bytes.size() == node.depth) {
        units_[node.unit].value = entries_[begin].value;
        ++begin;
      }
      const uint32_t base = place_children({begin, node.end, node.depth}, queue);
      units_[node.unit].base_and_label |= base << 8;
    }
    return root_base;
  }
  std::vector<Unit> take_units() { return std::move(units_); }

 private:
  // Entries begin .. end - 1 share their first `depth` bytes.
  struct Node {
    size_t begin = 0;
    size_t end = 0;
    size_t depth = 0;
    uint32_t unit = 0;
  };
  struct Block {
    std::bitset<kBlockUnits> taken;  // units
    std::bitset<kBlockUnits> bases;  // low bytes of bases in use: two nodes must not share one
    size_t taken_count = 0;
  };

  uint32_t place_children(const Node& parent, std::deque<Node>& queue) {
    labels_.clear();
    children_.clear();
    for (size_t i = parent.begin; i < parent.end; ++i) {
      const auto label = static_cast<unsigned char>(entries_[i].bytes[parent.depth]);
      if (labels_.empty() || labels_.back() != label) {
        labels_.push_back(label);
        children_.push_back({i, i, parent.depth + 1});
      }
      children_.back().end = i + 1;
    }
    if (labels_.empty()) {
      return kDeadBlock;
    }
    const uint32_t base = claim_base();
    for (size_t i = 0; i < labels_.size(); ++i) {
      children_[i].unit = base ^ labels_[i];
      units_[children_[i].unit].base_and_label = labels_[i];
      queue.push_back(children_[i]);
    }
    return base;
  }

  // Finds a base whose units for all of `labels_` are free, and takes them.
  uint32_t claim_base() {
    // Old blocks are nearly full; searching only the newest keeps building linear.
    constexpr size_t kSearchedBlocks = 16;
    const size_t first =
        blocks_.size() > kSearchedBlocks ? blocks_.size() - kSearchedBlocks : size_t{0};
    for (size_t b = first;; ++b) {
      if (b == blocks_.size()) {
        if (units_.size() + kBlockUnits > kMaxUnits) {
          throw std::length_error("a vocabulary of " + std::to_string(entries_.size()) +
                                  " tokens needs a trie of more than 2^24 nodes");
        }
        blocks_.emplace_back();
        units_.resize(units_.size() + kBlockUnits);
      }
      Block& block = blocks_[b];
      if (kBlockUnits - block.taken_count < labels_.size()) {
        continue;
      }
      const std::bitset<kBlockUnits> free = ~block.taken;
      for (size_t unit = free._Find_first(); unit < kBlockUnits; unit = free._Find_next(unit)) {
        const auto low = static_cast<uint32_t>(unit) ^ labels_[0];
        if (block.bases[low] || std::any_of(labels_.begin(), labels_.end(), [&](uint32_t label) {
              return block.taken[low ^ label];
            })) {
          continue;
        }
        block.bases.set(low);
        block.taken_count += labels_.size();
        for (const uint32_t label : labels_) {
          block.taken.set(low ^ label);
        }
        // Block 0 of the units is the dead one.
        return static_cast<uint32_t>(b + 1) * kBlockUnits + low;
      }
    }
  }

  const std::vector<Entry>& entries_;
  std::vector<Unit> units_;
  std::vector<Block> blocks_;
  std::vector<uint32_t> labels_;
  std::vector<Node> children_;
};

std::vector<ByteTrie::Unit> ByteTrie::dead_block() {
  std::vector<Unit> units(kBlockUnits);
  for (uint32_t i = 0; i < kBlockUnits; ++i) {
    units[i].base_and_label = ~i & 0xFF;
  }
  return units;
}

ByteTrie::ByteTrie(std::vector<Entry> entries) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return a.bytes < b.bytes;
  });
  for (size_t i = 0; i < entries.size(); ++i) {
    if (entries[i].bytes.empty() || entries[i].value < 0) {
      throw std::invalid_argument("a trie entry is empty or has the value " +
                                  std::to_string(entries[i].value) + "; expected 0 or more");
    }
    if (i > 0 && entries[i].bytes == entries[i - 1].bytes) {
      throw std::invalid_argument("a trie entry is there twice, with the values " +
                                  std::to_string(entries[i - 1].value) + " and " +
                                  std::to_string(entries[i].value));
    }
  }
  Builder builder(entries);
  root_base_ = builder.build();
  units_ = builder.take_units();
}

}  // namespace rwkv
