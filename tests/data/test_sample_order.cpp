#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/sample_order.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int64_t kMiniPileTokens = 1'498'226'207;
constexpr int64_t kPileTokens = 332'115'325'534;

// Corpora of windows of one token have as many slots as tokens, less one.
SampleOrder shuffled(int64_t slots, uint64_t seed) {
  return {SampleOrderKind::kShuffled, slots + 1, 1, seed};
}

std::vector<int64_t> offsets(const SampleOrder& order, int64_t first, int64_t count) {
  std::vector<int64_t> result;
  for (int64_t n = first; n < first + count; ++n) {
    result.push_back(order.token_offset(n));
  }
  return result;
}

TEST(SampleOrder, HasTheNamesOfTheConfiguration) {
  for (const char* name : {"shuffled", "sequential", "rwkv_lm"}) {
    EXPECT_EQ(name_of(parse_sample_order(name)), name);
  }
  EXPECT_EQ(parse_sample_order("rwkv_lm"), SampleOrderKind::kRwkvLm);
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, parse_sample_order("random")),
              AllOf(HasSubstr("random"), HasSubstr("shuffled, sequential, rwkv_lm")));
}

// Known primes of RWKV-LM's published runs, and of its demo data.
TEST(MagicPrime, MatchesRwkvLm) {
  EXPECT_EQ(magic_prime(kMiniPileTokens, 512), 2926181);
  EXPECT_EQ(magic_prime(kMiniPileTokens, 4096), 365759);
  EXPECT_EQ(magic_prime(kPileTokens, 1024), 324331313);
  EXPECT_EQ(magic_prime(kPileTokens, 2048), 162165671);
  EXPECT_EQ(magic_prime(kPileTokens, 4096), 81082817);
  EXPECT_EQ(magic_prime(kPileTokens, 8192), 40541399);
  EXPECT_EQ(magic_prime(66833, 512), 113);
  EXPECT_EQ(magic_prime(66833, 128), 521);
  EXPECT_EQ(magic_prime(400, 8), 47);
  // By trial division in Python.
  EXPECT_EQ(magic_prime(kPileTokens, 1), 332115325517);
  EXPECT_EQ(magic_prime(9'000'000'000'000'000, 1), 8'999'999'999'999'963);
}

TEST(MagicPrime, MatchesTrialDivisionAtEverySmallSize) {
  const auto is_prime = [](int64_t n) {
    for (int64_t i = 2; i * i <= n; ++i) {
      if (n % i == 0) {
        return false;
      }
    }
    return n >= 2;
  };
  int64_t expected = 0;
  for (int64_t windows = 0; windows < 20000; ++windows) {
    if ((windows - 1) % 3 == 2 && is_prime(windows - 1)) {
      expected = windows - 1;
    }
    ASSERT_EQ(magic_prime(windows * 7 + 6, 7), expected) << windows;
  }
}

TEST(RwkvLmOrder, MatchesTheWorkedExampleOfMiniPile) {
  const SampleOrder order(SampleOrderKind::kRwkvLm, kMiniPileTokens, 512, 0);
  EXPECT_EQ(order.samples_per_epoch(), 2926181);
  // i of RWKV-LM is sample + 1.
  EXPECT_EQ(order.token_offset(0), 925941248);
  EXPECT_EQ(order.token_offset(1), 1414711296);
  EXPECT_EQ(order.token_offset(2), 1029138944);
  EXPECT_EQ(order.token_offset(40320), 631271424);
  EXPECT_EQ(order.token_offset(40323), 1417368064);
  EXPECT_EQ(order.token_offset(2863527), 1447997952);
  EXPECT_EQ(order.token_offset(1'000'000'000'000), 1485161984);
}

TEST(RwkvLmOrder, MatchesBigIntegersWhereProductsOverflow) {
  // Values of Python's unbounded integers.
  const SampleOrder pile(SampleOrderKind::kRwkvLm, kPileTokens, 1, 0);
  EXPECT_THAT(offsets(pile, 0, 3), ElementsAre(205258559354, 313607172764, 228135894286));
  EXPECT_EQ(pile.token_offset(1'000'000), 277466118033);
  EXPECT_EQ(pile.token_offset(1'000'000'000'000), 195702893637);
  const SampleOrder large(SampleOrderKind::kRwkvLm, 9'000'000'000'000'000, 1, 0);
  EXPECT_EQ(large.token_offset(0), 5562305898749031);
  EXPECT_EQ(large.token_offset(40320), 8988127704486477);
  EXPECT_EQ(large.token_offset(1'000'000'000'000), 4028750487976841);
}

TEST(RwkvLmOrder, MatchesTheSmallWorkedExample) {
  const SampleOrder order(SampleOrderKind::kRwkvLm, 400, 8, 0);
  std::vector<int64_t> slots;
  for (const int64_t offset : offsets(order, 0, 8)) {
    EXPECT_EQ(offset % 8, 0);
    slots.push_back(offset / 8);
  }
  EXPECT_THAT(slots, ElementsAre(29, 44, 31, 23, 6, 13, 30, 43));
}

TEST(RwkvLmOrder, VisitsEverySlotBelowThePrimeOnceAnEpoch) {
  const SampleOrder order(SampleOrderKind::kRwkvLm, 66833, 128, 0);
  ASSERT_EQ(order.samples_per_epoch(), 521);
  std::vector<int64_t> seen = offsets(order, 0, 521);
  EXPECT_EQ(seen, offsets(order, 521, 521));
  std::sort(seen.begin(), seen.end());
  for (int64_t slot = 0; slot < 521; ++slot) {
    EXPECT_EQ(seen[static_cast<size_t>(slot)], slot * 128);
  }
}

TEST(RwkvLmOrder, RefusesACorpusTooSmallForAMagicPrime) {
  const std::string text =
      THROWN_TEXT(std::invalid_argument, SampleOrder(SampleOrderKind::kRwkvLm, 66833, 512, 0));
  EXPECT_THAT(text, AllOf(HasSubstr("66,833"), HasSubstr("130 windows"), HasSubstr("113")));
  THROWN_TEXT(std::invalid_argument, SampleOrder(SampleOrderKind::kRwkvLm, 9, 8, 0));
}

TEST(RwkvLmOrder, AcceptsExactlyThePrimesRwkvLmAccepts) {
  for (int64_t windows = 1; windows < 5000; ++windows) {
    const int64_t prime = magic_prime(windows, 1);
    const bool expected = static_cast<double>(prime) / static_cast<double>(windows) > 0.9;
    bool accepted = true;
    try {
      SampleOrder(SampleOrderKind::kRwkvLm, windows, 1, 0);
    } catch (const std::invalid_argument&) {
      accepted = false;
    }
    ASSERT_EQ(accepted, expected) << windows;
  }
}

TEST(SequentialOrder, WalksTheSlotsInFileOrder) {
  const SampleOrder order(SampleOrderKind::kSequential, 33, 8, 5);
  EXPECT_EQ(order.samples_per_epoch(), 4);
  EXPECT_THAT(offsets(order, 0, 9), ElementsAre(0, 8, 16, 24, 0, 8, 16, 24, 0));
}

// The window and the token after it must lie in the corpus.
TEST(SampleOrder, CountsTheSlotsThatFit) {
  for (const auto kind : {SampleOrderKind::kSequential, SampleOrderKind::kShuffled}) {
    EXPECT_EQ(SampleOrder(kind, 9, 8, 0).samples_per_epoch(), 1);
    EXPECT_EQ(SampleOrder(kind, 16, 8, 0).samples_per_epoch(), 1);
    EXPECT_EQ(SampleOrder(kind, 17, 8, 0).samples_per_epoch(), 2);
    const std::string text = THROWN_TEXT(std::invalid_argument, SampleOrder(kind, 8, 8, 0));
    EXPECT_THAT(text, AllOf(HasSubstr("8 tokens"), HasSubstr("ctx_len = 8")));
    EXPECT_THROW(SampleOrder(kind, 0, 8, 0), std::invalid_argument);
    EXPECT_THROW(SampleOrder(kind, 9, 0, 0), std::invalid_argument);
    EXPECT_THROW(SampleOrder(kind, 9, 8, 0).token_offset(-1), std::invalid_argument);
  }
}

// These values come from another program (Python) written from the header's description: they hold
// the order fixed for every platform, so that a run can be resumed anywhere.
TEST(ShuffledOrder, IsFrozen) {
  EXPECT_THAT(offsets(shuffled(10, 0), 0, 20),
              ElementsAre(8, 1, 6, 9, 0, 2, 3, 4, 5, 7, 8, 9, 4, 6, 0, 7, 3, 2, 1, 5));
  const SampleOrder minipile = shuffled(2926223, 42);
  EXPECT_THAT(offsets(minipile, 0, 4), ElementsAre(796982, 1432091, 2100806, 1959381));
  EXPECT_EQ(minipile.token_offset(2926222), 1359806);
  EXPECT_EQ(minipile.token_offset(2926223), 2778731);
  EXPECT_EQ(minipile.token_offset(1'000'000'000), 2316651);
  EXPECT_EQ(minipile.token_offset(1'000'000'000'000'000), 2859527);
  // 2^53 + 1 slots: a square root in double would be off.
  EXPECT_THAT(offsets(shuffled(9007199254740993, std::numeric_limits<uint64_t>::max()), 0, 4),
              ElementsAre(7050550465420568, 6237723394042895, 6377146671473496, 4493552979248881));
}

TEST(ShuffledOrder, VisitsEverySlotOnceAnEpoch) {
  std::vector<int64_t> sizes(140);
  std::iota(sizes.begin(), sizes.end(), 1);
  for (const int64_t size : {255, 256, 257, 1000, 4096, 4097, 65537, 100003}) {
    sizes.push_back(size);
  }
  for (const int64_t slots : sizes) {
    const SampleOrder order = shuffled(slots, 3);
    ASSERT_EQ(order.samples_per_epoch(), slots);
    for (const int64_t epoch : {0, 1, 17}) {
      std::vector<int64_t> seen = offsets(order, epoch * slots, slots);
      std::sort(seen.begin(), seen.end());
      for (int64_t slot = 0; slot < slots; ++slot) {
        ASSERT_EQ(seen[static_cast<size_t>(slot)], slot) << slots << " slots, epoch " << epoch;
      }
    }
  }
}

TEST(ShuffledOrder, DiffersBetweenEpochsAndSeeds) {
  const SampleOrder order = shuffled(1000, 1);
  const auto first = offsets(order, 0, 1000);
  const auto agreeing = [&](const std::vector<int64_t>& other) {
    int same = 0;
    for (size_t i = 0; i < 1000; ++i) {
      same += first[i] == other[i] ? 1 : 0;
    }
    return same;
  };
  // Two random permutations agree in one place on average, in ten or more one time in a million.
  EXPECT_EQ(agreeing(offsets(shuffled(1000, 1), 0, 1000)), 1000);
  EXPECT_LT(agreeing(offsets(order, 1000, 1000)), 10);
  EXPECT_LT(agreeing(offsets(shuffled(1000, 2), 0, 1000)), 10);
  EXPECT_LT(agreeing(offsets(shuffled(1000, 1ULL << 63), 0, 1000)), 10);
  std::vector<int64_t> in_file_order(1000);
  std::iota(in_file_order.begin(), in_file_order.end(), 0);
  EXPECT_LT(agreeing(in_file_order), 10);
}

// Over many epochs each slot comes at each place, and after each other slot, equally often.
TEST(ShuffledOrder, IsUniform) {
  for (const int64_t slots : {2, 3, 5, 11, 16}) {
    const SampleOrder order = shuffled(slots, 9);
    constexpr int64_t kEpochs = 20000;
    std::map<std::pair<int64_t, int64_t>, int64_t> places;
    std::map<std::pair<int64_t, int64_t>, int64_t> neighbours;
    for (int64_t epoch = 0; epoch < kEpochs; ++epoch) {
      const auto seen = offsets(order, epoch * slots, slots);
      for (int64_t i = 0; i < slots; ++i) {
        ++places[{i, seen[static_cast<size_t>(i)]}];
        if (i > 0) {
          ++neighbours[{seen[static_cast<size_t>(i - 1)], seen[static_cast<size_t>(i)]}];
        }
      }
    }
    // Five standard deviations of a count around its mean.
    const auto check = [&](const auto& counts, int64_t cells, int64_t total) {
      EXPECT_EQ(static_cast<int64_t>(counts.size()), cells);
      const double mean = static_cast<double>(total) / static_cast<double>(cells);
      for (const auto& [cell, count] : counts) {
        EXPECT_NEAR(static_cast<double>(count), mean, 5 * std::sqrt(mean))
            << slots << " slots: " << cell.first << ", " << cell.second;
      }
    };
    check(places, slots * slots, kEpochs * slots);
    check(neighbours, slots * (slots - 1), kEpochs * (slots - 1));
  }
}

TEST(ShuffledOrder, SpreadsNeighbouringSamplesOverALargeCorpus) {
  const SampleOrder order = shuffled(2926223, 7);
  constexpr int64_t kSamples = 64000;
  std::vector<int> counts(64);
  for (int64_t n = 0; n < kSamples; ++n) {
    ++counts[static_cast<size_t>(order.token_offset(n) * 64 / 2926223)];
  }
  double chi_squared = 0;
  for (const int count : counts) {
    chi_squared += (count - 1000.0) * (count - 1000.0) / 1000.0;
  }
  // 63 degrees of freedom: the mean is 63, and 120 is exceeded once in 100,000 times.
  EXPECT_LT(chi_squared, 120);
  EXPECT_GT(chi_squared, 25);
}

}  // namespace
}  // namespace rwkv
