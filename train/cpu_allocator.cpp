#include "train/cpu_allocator.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <map>
#include <mutex>
#include <unordered_map>

#include <c10/core/Allocator.h>
#include <c10/util/Exception.h>

#include <sys/mman.h>

namespace rwkv {
namespace {

constexpr size_t kSmallest = size_t{64} << 10;
// Of kept blocks; a page.
constexpr size_t kGranule = 4096;
// Of the C library's: LibTorch's vector code expects whole cache lines.
constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
// Address space is asked for in stretches of a GiB, and costs memory only where it is touched: one
// long stretch is divided with less waste than many short ones. Not a power of two: see below.
constexpr size_t kStretch = 513 * kHugePage;
// Tensors whose places differ by a multiple of 256 MiB, walked together as by AdamW, had a third of
// an EPYC's memory rate (128 MiB: four fifths). Stretches and blocks lie side by side, so none has
// such a size.
constexpr size_t kUnluckyDistance = size_t{64} << 20;
// After that much more of it is in use for the first time, free blocks lose their pages.
constexpr size_t kDropEvery = 16 * kHugePage;

size_t round_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

[[noreturn]] void throw_out_of_memory(size_t bytes) {
  C10_THROW_ERROR(OutOfMemoryError, c10::str("the system refuses ", bytes, " bytes for a tensor"));
}

// Blocks of whole pages out of the system's memory.
class BlockPool {
 public:
  void* take(size_t bytes) {
    if (bytes > std::numeric_limits<size_t>::max() / 2) {
      throw_out_of_memory(bytes);
    }
    size_t size = round_up(bytes, kGranule);
    if (size % kUnluckyDistance == 0) {
      size += kGranule;
    }
    const std::lock_guard lock(mutex_);
    auto block = smallest_that_fits(size);
    if (block == free_.end()) {
      if (!grow(size)) {
        throw_out_of_memory(bytes);
      }
      block = smallest_that_fits(size);
    }
    const auto [start, available] = *block;
    free_.erase(block);
    if (available > size) {
      free_.emplace(start + size, available - size);
    }
    used_.emplace(start, size);
    note_first_use(start, start + size);
    return start;
  }

  // False if the block is not one of the pool's.
  bool give_back(void* pointer) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(pointer);
    if (found == used_.end()) {
      return false;
    }
    insert_free(static_cast<char*>(pointer), found->second);
    used_.erase(found);
    return true;
  }

  size_t touched() {
    const std::lock_guard lock(mutex_);
    return touched_;
  }

 private:
  using FreeBlocks = std::map<char*, size_t>;

  // There are some dozens at most, for neighbours join.
  FreeBlocks::iterator smallest_that_fits(size_t size) {
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block) {
      if (block->second >= size && (best == free_.end() || block->second < best->second)) {
        best = block;
      }
    }
    return best;
  }

  static void* map(size_t bytes) {
    return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }

  // False if the system refuses.
  bool grow(size_t size) {
    size_t bytes = round_up(std::max(size, kStretch), kHugePage);
    void* start = map(bytes);
    if (start == MAP_FAILED) {
      // Where address space is limited.
      bytes = round_up(size, kHugePage);
      start = map(bytes);
    }
    if (start == MAP_FAILED) {
      return false;
    }
    // Advice alone: without huge pages the memory is as good, and slower.
    madvise(start, bytes, MADV_HUGEPAGE);
    untouched_.emplace(static_cast<char*>(start) + bytes, static_cast<char*>(start));
    insert_free(static_cast<char*>(start), bytes);
    return true;
  }

  // [start, end) is handed out: what of its stretch was never in use before counts. Where stretches
  // lie side by side it may be of two.
  void note_first_use(char* start, char* end) {
    for (auto stretch = untouched_.upper_bound(start);; ++stretch) {
      auto& [stretch_end, untouched] = *stretch;
      char* const used_end = std::min(end, stretch_end);
      if (used_end > untouched) {
        touched_ += static_cast<size_t>(used_end - untouched);
        untouched = used_end;
      }
      if (stretch_end >= end) {
        break;
      }
    }
    if (touched_ < dropped_at_ + kDropEvery) {
      return;
    }
    // Free blocks that are too small keep their addresses and lose their pages: what start-up left
    // does not add to what steps need. Once steps repeat, nothing grows.
    dropped_at_ = touched_;
    for (const auto& [place, available] : free_) {
      madvise(place, available, MADV_DONTNEED);
    }
  }

  void insert_free(char* start, size_t size) {
    auto after = free_.lower_bound(start);
    if (after != free_.end() && start + size == after->first) {
      size += after->second;
      after = free_.erase(after);
    }
    if (after != free_.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second == start) {
        before->second += size;
        return;
      }
    }
    free_.emplace(start, size);
  }

  std::mutex mutex_;
  FreeBlocks free_;
  std::unordered_map<void*, size_t> used_;
  std::map<char*, char*> untouched_;  // by the end of a stretch: where what was never used begins
  size_t touched_ = 0;
  size_t dropped_at_ = 0;  // touched_ when free blocks last lost their pages
};

// Never destroyed: tensors in static variables are freed after main.
BlockPool& pool() {
  static auto* const instance = new BlockPool;
  return *instance;
}

void* take_small(size_t bytes) {
  void* pointer = nullptr;
  if (posix_memalign(&pointer, kAlignment, bytes) != 0) {
    throw_out_of_memory(bytes);
  }
  return pointer;
}

void give_back(void* pointer) {
  if (pointer != nullptr && !pool().give_back(pointer)) {
    std::free(pointer);
  }
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = nullptr;
    if (bytes > 0) {
      pointer = bytes < kSmallest ? take_small(bytes) : pool().take(bytes);
    }
    return {pointer, pointer, &give_back, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

}  // namespace

void keep_cpu_memory() {
  static KeepingAllocator allocator;
  // Above LibTorch's own, which has priority 0.
  c10::SetAllocator(c10::DeviceType::CPU, &allocator, 1);
}

size_t kept_cpu_memory() {
  return pool().touched();
}

}  // namespace rwkv
