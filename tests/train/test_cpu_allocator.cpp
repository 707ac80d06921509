#include <thread>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/cpu_allocator.h"

namespace rwkv {
namespace {

class KeptCpuMemory : public testing::Test {
 protected:
  void SetUp() override { keep_cpu_memory(); }
};

at::Tensor of_bytes(int64_t bytes) {
  return at::empty({bytes}, at::kByte);
}

TEST_F(KeptCpuMemory, GivesAFreedBlockOutAgain) {
  const void* first = of_bytes(5 << 20).const_data_ptr();
  EXPECT_EQ(of_bytes(5 << 20).const_data_ptr(), first);
}

TEST_F(KeptCpuMemory, JoinsFreedNeighboursIntoOneBlock) {
  std::vector<at::Tensor> parts;
  for (int i = 0; i < 8; ++i) {
    parts.push_back(of_bytes(38 << 20));
  }
  // Freed in an order in which each joins a neighbour before, after, or on both sides.
  for (const size_t i : {1, 3, 2, 0, 7, 5, 6, 4}) {
    parts[i].reset();
  }
  const size_t before = kept_cpu_memory();
  const at::Tensor whole = of_bytes(int64_t{8} * 38 << 20);
  EXPECT_EQ(kept_cpu_memory(), before);
}

TEST_F(KeptCpuMemory, IsFlatOverRepeatedSteps) {
  const auto step = [] {
    std::vector<at::Tensor> kept;
    for (int64_t i = 0; i < 60; ++i) {
      kept.push_back(of_bytes((i * 7919 % 13 + 1) * 300'001));
      const at::Tensor temporary = of_bytes((i * 104729 % 7 + 1) * 700'001);
      if (i % 3 == 0) {
        kept.erase(kept.begin());
      }
    }
  };
  step();
  const size_t after_one = kept_cpu_memory();
  for (int i = 0; i < 1000; ++i) {
    step();
  }
  EXPECT_EQ(kept_cpu_memory(), after_one);
}

// Memory is slow where tensors at such distances are walked together.
TEST_F(KeptCpuMemory, DoesNotPlaceTensorsWholeMultiplesOf64MiBApart) {
  constexpr int64_t kUnlucky = int64_t{64} << 20;
  for (const int64_t bytes : {4 * kUnlucky, 16 * kUnlucky, int64_t{700} << 20}) {
    std::vector<at::Tensor> held;
    for (int i = 0; i < 4; ++i) {
      held.push_back(of_bytes(bytes));
      for (int other = 0; other < i; ++other) {
        EXPECT_NE((static_cast<const char*>(held[i].const_data_ptr()) -
                   static_cast<const char*>(held[other].const_data_ptr())) %
                      kUnlucky,
                  0)
            << bytes << " bytes, tensors " << other << " and " << i;
      }
    }
  }
}

TEST_F(KeptCpuMemory, NeverHandsABlockOutTwice) {
  const auto work = [](int64_t mark) {
    std::vector<at::Tensor> held;
    for (int64_t i = 0; i < 300; ++i) {
      held.push_back(at::full({70'000 + i * 13 % 500 * 100}, mark * 1000 + i, at::kLong));
      if (held.size() > 6) {
        const int64_t expected = mark * 1000 + i - 6;
        EXPECT_TRUE((held.front() == expected).all().item<bool>());
        held.erase(held.begin());
      }
    }
  };
  std::thread other(work, 1);
  work(2);
  other.join();
}

TEST_F(KeptCpuMemory, RefusesWhatTheSystemDoesNotHave) {
  EXPECT_THAT(THROWN_TEXT(c10::OutOfMemoryError, of_bytes(int64_t{1} << 46)),
              testing::HasSubstr("the system refuses 70368744177664 bytes for a tensor"));
}

}  // namespace
}  // namespace rwkv
