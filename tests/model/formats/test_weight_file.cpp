#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/weight_file.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

template <class T>
std::span<const std::byte> bytes_of(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

template <class T>
std::vector<T> values_of(std::span<const std::byte> bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!bytes.empty()) {
    std::memcpy(values.data(), bytes.data(), bytes.size());
  }
  return values;
}

template <class T>
std::vector<T> copied(const StoredTensor& tensor) {
  std::vector<std::byte> out;
  tensor.copy_to(out);
  return values_of<T>(out);
}

TEST(StoredTensor, GathersATransposedMatrixRowByRow) {
  const std::vector<int32_t> storage = {0, 1, 2, 3, 4, 5};
  const StoredTensor tensor{.name = "w",
                            .dtype = WeightDtype::kI32,
                            .shape = {3, 2},
                            .strides = {1, 3},
                            .storage = bytes_of(storage),
                            .offset = 0};
  EXPECT_FALSE(tensor.is_contiguous());
  EXPECT_THAT(copied<int32_t>(tensor), ElementsAre(0, 3, 1, 4, 2, 5));
}

TEST(StoredTensor, GathersAnyElementSizeAndRank) {
  const auto check = [](WeightDtype dtype, auto zero) {
    using T = decltype(zero);
    std::vector<T> storage(60);
    for (size_t i = 0; i < storage.size(); ++i) {
      storage[i] = static_cast<T>(i);
    }
    // [2, 3, 2, 2] of a [3, 4, 5] block: permuted, sliced, and its last axis repeated.
    const StoredTensor tensor{.name = "w",
                              .dtype = dtype,
                              .shape = {2, 3, 2, 2},
                              .strides = {5, 20, 2, 0},
                              .storage = bytes_of(storage),
                              .offset = 6};
    std::vector<T> expected;
    for (const int a : {0, 1}) {
      for (const int b : {0, 1, 2}) {
        for (const int c : {0, 1}) {
          expected.insert(expected.end(), 2, static_cast<T>(6 + 5 * a + 20 * b + 2 * c));
        }
      }
    }
    EXPECT_EQ(copied<T>(tensor), expected) << name_of(dtype);
  };
  check(WeightDtype::kU8, uint8_t{0});
  check(WeightDtype::kBf16, uint16_t{0});
  check(WeightDtype::kI32, int32_t{0});
  check(WeightDtype::kI64, int64_t{0});
}

TEST(StoredTensor, CopiesAContiguousPartOfAStorageAndScalars) {
  const std::vector<float> storage = {0, 1, 2, 3, 4, 5, 6, 7};
  StoredTensor tensor{.name = "w",
                      .dtype = WeightDtype::kF32,
                      .shape = {1, 2, 2},
                      .strides = {77, 2, 1},  // the stride of a size of 1 means nothing
                      .storage = bytes_of(storage),
                      .offset = 3};
  EXPECT_TRUE(tensor.is_contiguous());
  EXPECT_THAT(copied<float>(tensor), ElementsAre(3, 4, 5, 6));
  tensor.shape = tensor.strides = {};
  EXPECT_EQ(tensor.num_elements(), 1);
  EXPECT_THAT(copied<float>(tensor), ElementsAre(3));
  tensor.shape = tensor.strides = {0, 4};
  EXPECT_EQ(tensor.num_elements(), 0);
  EXPECT_TRUE(copied<float>(tensor).empty());
}

TEST(StoredTensor, AppendsToWhatIsThereAndRefusesAnotherSize) {
  const std::vector<uint8_t> storage = {1, 2, 3};
  const StoredTensor tensor{.name = "w",
                            .dtype = WeightDtype::kU8,
                            .shape = {3},
                            .strides = {1},
                            .storage = bytes_of(storage),
                            .offset = 0};
  std::vector<std::byte> out = {std::byte{9}};
  tensor.copy_to(out);
  EXPECT_THAT(values_of<uint8_t>(out), ElementsAre(9, 1, 2, 3));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, tensor.copy_to(std::span(out))),
              HasSubstr("w: copied to 4 bytes, but the tensor [3] has 3"));
}

TEST(WeightFile, FindsATensorByName) {
  WeightFile file;
  file.tensors.resize(2);
  file.tensors[0].name = "a";
  file.tensors[1].name = "b";
  EXPECT_EQ(file.find("b"), &file.tensors[1]);
  EXPECT_EQ(file.find("c"), nullptr);
}

uint16_t f32_to(WeightDtype to, float value) {
  return values_of<uint16_t>(
      convert_elements(bytes_of(std::vector{value}), WeightDtype::kF32, to))[0];
}

TEST(ConvertElements, RoundsToTheNearestHalfWithTiesToEven) {
  const auto half = [](float value) { return f32_to(WeightDtype::kF16, value); };
  EXPECT_EQ(half(1.0f), 0x3c00);
  EXPECT_EQ(half(-2.5f), 0xc100);
  EXPECT_EQ(half(65504.0f), 0x7bff);
  EXPECT_EQ(half(65519.996f), 0x7bff);
  EXPECT_EQ(half(65520.0f), 0x7c00);
  EXPECT_EQ(half(1.0f + 0x1p-11f), 0x3c00);             // a tie, to the even side below
  EXPECT_EQ(half(1.0f + 3 * 0x1p-11f), 0x3c02);         // a tie, to the even side above
  EXPECT_EQ(half(1.0f + 0x1p-11f + 0x1p-23f), 0x3c01);  // just past the tie
  EXPECT_EQ(half(0x1p-14f), 0x0400);                    // the smallest normal half
  EXPECT_EQ(half(0x1.ff8p-15f), 0x03ff);                // the largest subnormal
  EXPECT_EQ(half(0x1.ffcp-15f), 0x0400);                // a tie between the two
  EXPECT_EQ(half(0x1p-24f), 0x0001);
  EXPECT_EQ(half(0x1p-25f), 0x0000);  // a tie between 0 and the smallest
  EXPECT_EQ(half(0x1.000002p-25f), 0x0001);
  EXPECT_EQ(half(-0x1.8p-24f), 0x8002);  // a tie between 1 and 2 steps
  EXPECT_EQ(half(-0.0f), 0x8000);
  EXPECT_EQ(half(-std::numeric_limits<float>::infinity()), 0xfc00);
}

TEST(ConvertElements, RoundsToTheNearestBf16WithTiesToEven) {
  const auto bf16 = [](float value) { return f32_to(WeightDtype::kBf16, value); };
  EXPECT_EQ(bf16(1.0f), 0x3f80);
  EXPECT_EQ(bf16(1.0f + 0x1p-8f), 0x3f80);
  EXPECT_EQ(bf16(1.0f + 3 * 0x1p-8f), 0x3f82);
  EXPECT_EQ(bf16(1.0f + 0x1p-8f + 0x1p-23f), 0x3f81);
  EXPECT_EQ(bf16(std::numeric_limits<float>::max()), 0x7f80);
  EXPECT_EQ(bf16(0x1p-133f), 0x0001);  // subnormals stay
  EXPECT_EQ(bf16(-0.0f), 0x8000);
}

TEST(ConvertElements, KeepsNanAndSignOfNan) {
  // All mantissa bits, which rounding up would carry into infinity; and only the lowest, which
  // cutting off would turn into infinity.
  for (const uint32_t bits : {0x7fffffffu, 0x7f800001u, 0xff800001u}) {
    const float nan = std::bit_cast<float>(bits);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    EXPECT_GT(f32_to(WeightDtype::kBf16, nan) & 0x7fff, 0x7f80);
    EXPECT_EQ(f32_to(WeightDtype::kBf16, nan) & 0x8000, sign);
    EXPECT_GT(f32_to(WeightDtype::kF16, nan) & 0x7fff, 0x7c00);
    EXPECT_EQ(f32_to(WeightDtype::kF16, nan) & 0x8000, sign);
  }
}

TEST(ConvertElements, ReturnsEveryHalfAndBf16ThroughF32) {
  for (const WeightDtype dtype : {WeightDtype::kF16, WeightDtype::kBf16}) {
    const int quiet_bit = dtype == WeightDtype::kF16 ? 0x200 : 0x40;
    const int infinity = dtype == WeightDtype::kF16 ? 0x7c00 : 0x7f80;
    std::vector<uint16_t> all(65536);
    for (size_t i = 0; i < all.size(); ++i) {
      all[i] = static_cast<uint16_t>(i);
    }
    const auto wide = convert_elements(bytes_of(all), dtype, WeightDtype::kF32);
    const auto back = values_of<uint16_t>(convert_elements(wide, WeightDtype::kF32, dtype));
    for (size_t i = 0; i < all.size(); ++i) {
      if ((all[i] & 0x7fff) > infinity) {
        EXPECT_GT(back[i] & 0x7fff, infinity) << i;
        EXPECT_NE(back[i] & quiet_bit, 0) << i;
      } else {
        ASSERT_EQ(back[i], all[i]);
      }
    }
  }
}

TEST(ConvertElements, CopiesTheSameTypeAndRefusesOthers) {
  const std::vector<int64_t> ids = {1, -1};
  EXPECT_EQ(
      values_of<int64_t>(convert_elements(bytes_of(ids), WeightDtype::kI64, WeightDtype::kI64)),
      ids);
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                          convert_elements(bytes_of(ids), WeightDtype::kI64, WeightDtype::kF32)),
              HasSubstr("cannot convert i64 to f32"));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument,
                          convert_elements(bytes_of(ids), WeightDtype::kF32, WeightDtype::kU8)),
              HasSubstr("cannot convert f32 to u8"));
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument,
                  convert_elements(
                      bytes_of(std::vector<uint8_t>(7)), WeightDtype::kF32, WeightDtype::kBf16)),
      HasSubstr("7 bytes are no whole number of f32 elements"));
}

}  // namespace
}  // namespace rwkv
