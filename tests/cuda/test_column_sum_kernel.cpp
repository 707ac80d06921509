// Column sums against float64.
#include "cuda/column_sum_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

template <typename Element>
class ColumnSumKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(ColumnSumKernel, Elements);

// Columns of the targets: one, a block's neighbours, borders inside of blocks, an empty target.
constexpr int64_t kColumns[][kMaxColumnTargets] = {
    {1, 0, 0}, {31, 1, 1}, {33, 0, 40}, {64, 64, 192}, {5, 63, 65}};

// bf16 rounds once, to 8 bits; fp32 adds up to 600 numbers in at least 16 parts.
template <typename Element>
constexpr double kTolerance = sizeof(Element) == 2 ? 4e-3 : 1e-6;

TYPED_TEST(ColumnSumKernel, MatchesTheSum) {
  // A row, fewer than parts, no multiple of parts and chains, those of a large grid.
  for (const int64_t num_rows : {1, 3, 17, 66, 528, 600}) {
    for (const auto& columns : kColumns) {
      const int64_t num_columns = columns[0] + columns[1] + columns[2];
      const Numbers rows = rounded<float>(normal(num_rows * num_columns, 1));
      const auto outputs = same_in_every_order([&] {
        const DeviceArray<float> device_rows(rows);
        DeviceArray<TypeParam> first(columns[0]), second(columns[1]), third(columns[2]);
        expect_launched(
            launch_column_sum<TypeParam>(device_rows.data(),
                                         num_rows,
                                         {.data = {first.data(), second.data(), third.data()},
                                          .columns = {columns[0], columns[1], columns[2]}},
                                         nullptr),
            "column_sum");
        Numbers all;
        for (const Numbers& part : {first.numbers(), second.numbers(), third.numbers()}) {
          all.insert(all.end(), part.begin(), part.end());
        }
        return Outputs{all};
      });
      Numbers expected(static_cast<size_t>(num_columns));
      for (size_t i = 0; i < rows.size(); ++i) {
        expected[i % expected.size()] += rows[i];
      }
      EXPECT_TRUE(close(outputs[0], expected, kTolerance<TypeParam>))
          << num_rows << " rows, " << num_columns << " columns";
    }
  }
}

TYPED_TEST(ColumnSumKernel, NoRowsGiveZerosAndNoColumnsNothing) {
  DeviceArray<TypeParam> out(40);
  expect_launched(
      launch_column_sum<TypeParam>(nullptr, 0, {.data = {out.data()}, .columns = {40}}, nullptr),
      "column_sum");
  EXPECT_EQ(out.numbers(), Numbers(40));
  EXPECT_EQ(launch_column_sum<TypeParam>(nullptr, 5, {}, nullptr), cudaSuccess);
}

}  // namespace
}  // namespace rwkv::test
