#include <array>
#include <cstring>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/state_tensors.h"
#include "tests/support/test_data.h"

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

// ---- rwkv.cpp's buffer --------------------------------------------------------------------------

// A layer of one head of two channels: ffn.shift, att.shift, att.wkv.
constexpr std::array<float, 8> kBuffer = {1, 2, 3, 4, 5, 6, 7, 8};

std::string bytes_of(std::span<const float> numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size_bytes()};
}

std::vector<float> numbers_of(const WeightFile& file, const std::string& name) {
  const StoredTensor* tensor = file.find(name);
  if (tensor == nullptr) {
    return {};
  }
  std::vector<float> numbers(static_cast<size_t>(tensor->num_elements()));
  tensor->copy_to(std::as_writable_bytes(std::span(numbers)));
  return numbers;
}

StateSizes sizes_of(const std::string& version) {
  return {
      .version = version,
      .n_layer = 1,
      .n_embd = 2,
      .wkv_shape = version == "rwkv4" ? std::vector<int64_t>{2, 2} : std::vector<int64_t>{1, 2, 2}};
}

TEST(StateBuffer, HasTheOrderOfRwkvCpp) {
  const test::TempFolder folder;
  const std::string path = folder.path("s.bin");
  test::write_file(path, bytes_of(kBuffer));
  for (const auto& [version, wkv] : {std::pair("rwkv4", testing::ElementsAre(5, 6, 7, 8)),
                                     std::pair("rwkv6", testing::ElementsAre(5, 6, 7, 8)),
                                     std::pair("rwkv7", testing::ElementsAre(5, 7, 6, 8))}) {
    const WeightFile state = read_state_buffer(path, sizes_of(version));
    EXPECT_EQ(state_kind(state), StateKind::kOwn);
    EXPECT_THAT(numbers_of(state, "blocks.0.ffn.shift"), testing::ElementsAre(1, 2));
    EXPECT_THAT(numbers_of(state, "blocks.0.att.shift"), testing::ElementsAre(3, 4));
    EXPECT_THAT(numbers_of(state, "blocks.0.att.wkv"), wkv) << version;
    EXPECT_EQ(version_of_state(state), version);
    EXPECT_EQ(state_sizes(state).wkv_shape, sizes_of(version).wkv_shape);
  }
}

TEST(StateBuffer, OfAnotherSizeIsRefused) {
  const test::TempFolder folder;
  const std::string path = folder.path("s.bin");
  for (const size_t bytes : {0, 28, 31, 36}) {
    test::write_file(path, std::string(bytes, '\0'));
    EXPECT_EQ(THROWN_TEXT(std::runtime_error, read_state_buffer(path, sizes_of("rwkv6"))),
              path + ": " + std::to_string(bytes) +
                  " bytes, but rwkv.cpp's state of rwkv6 with 1 layers of 2 channels has 32; is it "
                  "of another model, or cut short?");
  }
}

TEST(StateBuffer, IsWrittenOfAWholeStateAlone) {
  const test::TempFolder folder;
  const std::string path = folder.path("s.bin");
  const auto data = [](size_t from, size_t count) {
    return std::as_bytes(std::span(kBuffer).subspan(from, count));
  };
  std::vector<TensorToWrite> tensors = {
      {.name = "blocks.0.att.wkv", .shape = {1, 2, 2}, .data = data(4, 4)},
      {.name = "blocks.0.att.shift", .shape = {2}, .data = data(2, 2)},
      {.name = "blocks.0.ffn.shift", .shape = {2}, .data = data(0, 2)}};
  write_state_buffer(path, tensors, sizes_of("rwkv7"));
  EXPECT_EQ(test::read_file(path), bytes_of(std::array<float, 8>{1, 2, 3, 4, 5, 7, 6, 8}));
  const auto thrown = [&] {
    return THROWN_TEXT(std::runtime_error,
                       write_state_buffer(folder.path("t.bin"), tensors, sizes_of("rwkv7")));
  };
  tensors[1].dtype = WeightDtype::kF16;
  EXPECT_THAT(thrown(), testing::HasSubstr("blocks.0.att.shift is f16 [2], expected f32 [2]"));
  tensors.erase(tensors.begin() + 1);
  EXPECT_THAT(thrown(), testing::HasSubstr("blocks.0.att.shift is missing"));
  EXPECT_THAT(folder.files(), testing::ElementsAre("s.bin"));
}

TEST(StateBuffer, SizesAreThoseOfAWholeState) {
  WeightFile file;
  file.path = "s.safetensors";
  file.tensors = {tensor("blocks.0.att.wkv", {2, 2}, {2, 1})};
  const auto thrown = [&] { return THROWN_TEXT(std::runtime_error, state_sizes(file)); };
  EXPECT_THAT(thrown(), testing::HasSubstr("does not say of which version"));
  file.metadata[kStateVersion] = "rwkv7";
  EXPECT_THAT(thrown(), testing::HasSubstr("is [2, 2], expected [heads, N, N]"));
  file.metadata[kStateVersion] = "rwkv4";
  EXPECT_THAT(thrown(), testing::HasSubstr("blocks.0.att.shift is missing"));
}

}  // namespace
}  // namespace rwkv
