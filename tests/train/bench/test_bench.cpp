#include <gtest/gtest.h>

#include "train/bench/bench.h"

namespace rwkv {
namespace {

TEST(SpreadOf, HasTheMedianBetweenTheTwoInTheMiddle) {
  EXPECT_EQ(spread_of({4, 1, 2, 8}).median, 3);
  EXPECT_EQ(spread_of({4, 1, 8}).median, 4);
  EXPECT_EQ(spread_of({5}).median, 5);
  EXPECT_EQ(spread_of({4, 1, 2, 8}).min, 1);
  EXPECT_EQ(spread_of({4, 1, 2, 8}).max, 8);
}

TEST(InOwnProcess, HandsRowsOverAsTheyAre) {
  const BenchRow row{.what = "x",
                     .ms = {.median = 2, .min = 1, .max = 3, .repeats = 4},
                     .figures = {{"floor_ms", 0.5}, {"tokens", 7}},
                     .conditions = {{"threads", 2}},
                     .parts = {{.what = "y", .ms = {}, .figures = {{"percent", 9}}}}};
  EXPECT_EQ(rows_to_json(in_own_process([&] { return std::vector{row}; })), rows_to_json({row}));
}

}  // namespace
}  // namespace rwkv
