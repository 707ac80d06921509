#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "model/formats/tensor_statistics.h"

namespace rwkv {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T>
StoredTensor vector_of(const std::vector<T>& values, WeightDtype dtype) {
  return {.name = "x",
          .dtype = dtype,
          .shape = {static_cast<int64_t>(values.size())},
          .strides = {1},
          .storage = std::as_bytes(std::span(values)),
          .offset = 0};
}

TEST(TensorStatistics, AreThoseOfTheNumbers) {
  const std::vector<float> values = {1, -2, 0, 4, 0};
  const TensorStatistics statistics = statistics_of(vector_of(values, WeightDtype::kF32));
  EXPECT_EQ(statistics.num_elements, 5);
  EXPECT_EQ(statistics.num_zeros, 2);
  EXPECT_EQ(statistics.min, -2);
  EXPECT_EQ(statistics.max, 4);
  EXPECT_DOUBLE_EQ(statistics.mean, 0.6);
  EXPECT_DOUBLE_EQ(statistics.std, std::sqrt(21.0 / 5 - 0.36));
  EXPECT_DOUBLE_EQ(statistics.norm, std::sqrt(21.0));
}

TEST(TensorStatistics, CountWhatIsNotFiniteApart) {
  // At every place of a vector, and past the last whole one.
  for (size_t place = 0; place < 37; ++place) {
    std::vector<float> values(40, 2);
    values[place] = kNan;
    values[place + 1] = kInf;
    values[place + 2] = -kInf;
    const TensorStatistics statistics = statistics_of(vector_of(values, WeightDtype::kF32));
    EXPECT_EQ(statistics.num_nan, 1);
    EXPECT_EQ(statistics.num_infinite, 2);
    EXPECT_EQ(statistics.min, 2);
    EXPECT_EQ(statistics.max, 2);
    EXPECT_EQ(statistics.mean, 2);
    EXPECT_EQ(statistics.std, 0);
  }
}

TEST(TensorStatistics, OfSeveralPiecesAreOne) {
  std::vector<float> values(200'001);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i) - 100'000;
  }
  const TensorStatistics statistics = statistics_of(vector_of(values, WeightDtype::kF32));
  EXPECT_EQ(statistics.min, -100'000);
  EXPECT_EQ(statistics.max, 100'000);
  EXPECT_EQ(statistics.num_zeros, 1);
  EXPECT_NEAR(statistics.mean, 0, 1e-9);
  EXPECT_NEAR(statistics.std, std::sqrt((200'001.0 * 200'001 - 1) / 12), 1e-7);
}

TEST(TensorStatistics, KnowANarrowSpreadFarFromZero) {
  // More than a piece.
  std::vector<double> values(70'000);
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = 1e6 + (i % 2 == 0 ? 1e-3 : -1e-3);
  }
  const TensorStatistics statistics = statistics_of(vector_of(values, WeightDtype::kF64));
  EXPECT_NEAR(statistics.std, 1e-3, 1e-9);
  EXPECT_NEAR(statistics.mean, 1e6, 1e-9);
}

TEST(TensorStatistics, ReadEveryDtype) {
  EXPECT_EQ(statistics_of(vector_of<double>({1e300, -1}, WeightDtype::kF64)).max, 1e300);
  EXPECT_EQ(statistics_of(vector_of<uint16_t>({0x3f80, 0xc020}, WeightDtype::kBf16)).min, -2.5);
  EXPECT_EQ(statistics_of(vector_of<uint16_t>({0x3c00, 0xc100}, WeightDtype::kF16)).min, -2.5);
  EXPECT_EQ(statistics_of(vector_of<int64_t>({-7, 7}, WeightDtype::kI64)).min, -7);
  EXPECT_EQ(statistics_of(vector_of<int32_t>({-7, 7}, WeightDtype::kI32)).min, -7);
  EXPECT_EQ(statistics_of(vector_of<int16_t>({-7, 7}, WeightDtype::kI16)).min, -7);
  EXPECT_EQ(statistics_of(vector_of<int8_t>({-7, 7}, WeightDtype::kI8)).min, -7);
  EXPECT_EQ(statistics_of(vector_of<uint8_t>({200, 7}, WeightDtype::kU8)).max, 200);
  EXPECT_EQ(statistics_of(vector_of<uint8_t>({0, 1}, WeightDtype::kBool)).mean, 0.5);
}

TEST(TensorStatistics, OfAViewAreOfItsElements) {
  const std::vector<float> values = {0, 1, 2, 3, 4, 5};
  StoredTensor tensor = vector_of(values, WeightDtype::kF32);
  tensor.shape = {2};
  tensor.strides = {2};
  tensor.offset = 1;
  EXPECT_EQ(statistics_of(tensor).mean, 2);
  tensor.strides = {1};
  EXPECT_EQ(statistics_of(tensor).mean, 1.5);
}

TEST(TensorStatistics, OfNothingAreNotNumbers) {
  for (const auto& values : {std::vector<float>{}, std::vector<float>{kNan, kInf}}) {
    const TensorStatistics statistics = statistics_of(vector_of(values, WeightDtype::kF32));
    for (const double figure :
         {statistics.min, statistics.max, statistics.mean, statistics.std, statistics.norm}) {
      EXPECT_TRUE(std::isnan(figure));
    }
  }
}

}  // namespace
}  // namespace rwkv
