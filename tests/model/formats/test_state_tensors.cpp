#include <array>
#include <cstring>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/state_tensors.h"

namespace rwkv {
namespace {

constexpr std::array<float, 4> kValues = {1, 2, 3, 4};

StoredTensor tensor(const std::string& name,
                    std::vector<int64_t> shape,
                    std::vector<int64_t> strides) {
  return {.name = name,
          .shape = std::move(shape),
          .strides = std::move(strides),
          .storage = std::as_bytes(std::span(kValues))};
}

TEST(StateTensors, KindIsToldByNames) {
  WeightFile file;
  EXPECT_EQ(state_kind(file), StateKind::kNone);
  file.tensors = {tensor("blocks.0.att.wkv", {1, 2, 2}, {4, 2, 1}),
                  tensor("blocks.0.ffn.shift", {4}, {1})};
  EXPECT_EQ(state_kind(file), StateKind::kOwn);
  file.tensors.push_back(tensor("blocks.0.att.time_state", {1, 2, 2}, {4, 2, 1}));
  EXPECT_EQ(state_kind(file), StateKind::kNone);
  file.tensors.erase(file.tensors.begin(), file.tensors.begin() + 2);
  EXPECT_EQ(state_kind(file), StateKind::kTimeState);
}

TEST(StateTensors, TimeStateIsTransposedAndAlone) {
  WeightFile file;
  file.tensors = {tensor("blocks.3.att.shift", {4}, {1}),
                  tensor("blocks.3.att.wkv", {1, 2, 2}, {4, 2, 1})};
  const std::vector<StoredTensor> result = as_time_state(file);
  ASSERT_EQ(result.size(), 1);
  EXPECT_EQ(result[0].name, "blocks.3.att.time_state");
  std::array<float, 4> values{};
  result[0].copy_to(std::as_writable_bytes(std::span(values)));
  EXPECT_THAT(values, testing::ElementsAre(1, 3, 2, 4));
}

TEST(StateTensors, VersionWithoutHeadsHasNoTimeState) {
  WeightFile file;
  file.path = "s.safetensors";
  file.tensors = {tensor("blocks.0.att.wkv", {2, 2}, {2, 1})};
  EXPECT_THAT(
      [&] { as_time_state(file); },
      testing::ThrowsMessage<std::runtime_error>(testing::AllOf(
          testing::HasSubstr("s.safetensors: blocks.0.att.wkv is [2, 2], expected [heads, N, N]"),
          testing::HasSubstr("keep the state as .safetensors"))));
}

}  // namespace
}  // namespace rwkv
