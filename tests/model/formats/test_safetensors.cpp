#include <cstring>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/safetensors.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

// A file of this header and data, whatever they are.
std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string file(reinterpret_cast<const char*>(&length), sizeof length);
  return file + header + data;
}

std::string refusal(const std::string& content) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  test::write_file(path, content);
  const std::string text = THROWN_TEXT(std::runtime_error, read_safetensors(path));
  EXPECT_THAT(text, HasSubstr("a.safetensors: "));
  return text;
}

std::string refused_header(const std::string& header, const std::string& data = "") {
  return refusal(file_of(header, data));
}

constexpr const char* kTwoTensors = R"({"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},)"
                                    R"("a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                                    R"("__metadata__":{"format":"pt"}} )";

TEST(Safetensors, ReadsTensorsInTheOrderOfTheirData) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  test::write_file(path, file_of(kTwoTensors, std::string("\0\0\x80\x3f\1\2\3", 7)));
  const WeightFile file = read_safetensors(path);
  EXPECT_EQ(file.path, path);
  EXPECT_EQ(file.format, "safetensors");
  EXPECT_THAT(file.metadata, ElementsAre(Pair("format", "pt")));
  ASSERT_EQ(file.tensors.size(), 2u);
  EXPECT_EQ(file.tensors[0].name, "a");
  EXPECT_EQ(file.tensors[0].dtype, WeightDtype::kF32);
  EXPECT_TRUE(file.tensors[0].shape.empty());
  std::vector<std::byte> bytes;
  file.tensors[0].copy_to(bytes);
  float value = 0;
  std::memcpy(&value, bytes.data(), sizeof value);
  EXPECT_EQ(value, 1.0f);
  EXPECT_EQ(file.tensors[1].name, "b");
  EXPECT_THAT(file.tensors[1].shape, ElementsAre(3));
  bytes.clear();
  file.tensors[1].copy_to(bytes);
  EXPECT_THAT(bytes, ElementsAre(std::byte{1}, std::byte{2}, std::byte{3}));
}

TEST(Safetensors, ReturnsWhatItWroteByteForByte) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  std::vector<std::byte> data(48);
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = static_cast<std::byte>(i);
  }
  const std::span<const std::byte> all(data);
  std::vector<TensorToWrite> tensors;
  for (const WeightDtype dtype : {WeightDtype::kF64,
                                  WeightDtype::kF32,
                                  WeightDtype::kF16,
                                  WeightDtype::kBf16,
                                  WeightDtype::kI64,
                                  WeightDtype::kI32,
                                  WeightDtype::kI16,
                                  WeightDtype::kI8,
                                  WeightDtype::kU8,
                                  WeightDtype::kBool}) {
    tensors.push_back({.name = "z." + std::string(name_of(dtype)),
                       .dtype = dtype,
                       .shape = {2, 3},
                       .data = all.first(static_cast<size_t>(6 * size_of(dtype)))});
  }
  tensors.push_back({.name = "scalar", .shape = {}, .data = all.first(4)});
  tensors.push_back({.name = "empty", .shape = {0, 3}, .data = {}});
  tensors.push_back({.name = "quote\"\n\xc3\xa4", .shape = {1}, .data = all.first(4)});
  const std::map<std::string, std::string> metadata = {{"format", "pt"}, {"a\"b", "\n"}};
  write_safetensors(path, tensors, metadata);

  const WeightFile file = read_safetensors(path);
  EXPECT_EQ(file.metadata, metadata);
  ASSERT_EQ(file.tensors.size(), tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(file.tensors[i].name, tensors[i].name);
    EXPECT_EQ(file.tensors[i].dtype, tensors[i].dtype);
    EXPECT_EQ(file.tensors[i].shape, tensors[i].shape);
    std::vector<std::byte> bytes;
    file.tensors[i].copy_to(bytes);
    EXPECT_TRUE(
        std::equal(bytes.begin(), bytes.end(), tensors[i].data.begin(), tensors[i].data.end()));
  }
  // The data start at a multiple of 8, as other readers like them.
  uint64_t length = 0;
  std::memcpy(&length, test::read_file(path).data(), sizeof length);
  EXPECT_EQ(length % 8, 0u);
}

TEST(Safetensors, RefusesToWriteWhatItCouldNotRead) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  const std::vector<std::byte> data(8);
  const TensorToWrite good{.name = "a", .shape = {2}, .data = data};
  const auto text = [&](std::vector<TensorToWrite> tensors,
                        const std::map<std::string, std::string>& metadata = {}) {
    return THROWN_TEXT(std::invalid_argument, write_safetensors(path, tensors, metadata));
  };
  EXPECT_THAT(text({good, good}), HasSubstr("two tensors are named \"a\""));
  EXPECT_THAT(text({{.name = "a", .shape = {3}, .data = data}}),
              HasSubstr("\"a\" of shape [3] and dtype f32 was given 8 bytes of data, expected 12"));
  EXPECT_THAT(text({{.name = "a", .shape = {-2}, .data = data}}), HasSubstr("shape [-2]"));
  EXPECT_THAT(text({{.name = "a\xff", .shape = {2}, .data = data}}),
              HasSubstr("\"a\\xff\" is not UTF-8"));
  EXPECT_THAT(text({{.name = "__metadata__", .shape = {2}, .data = data}}),
              HasSubstr("\"__metadata__\", which safetensors reserves"));
  EXPECT_THAT(text({good}, {{"a", "\xff"}}), HasSubstr("metadata"));
  EXPECT_THAT(text({{.name = "a", .shape = std::vector<int64_t>(9, 1), .data = data}}),
              HasSubstr("\"a\" has 9 dimensions, expected at most 8"));
  EXPECT_TRUE(folder.files().empty());
}

TEST(Safetensors, RefusesHeadersThatBreakTheLayout) {
  EXPECT_THAT(refusal(""), HasSubstr("does not start as a safetensors file"));
  EXPECT_THAT(refused_header("{"), HasSubstr("broken JSON"));
  EXPECT_THAT(refused_header("{} x"), HasSubstr("broken JSON"));
  EXPECT_THAT(refused_header("{\"a\xff\":1}"), HasSubstr("broken JSON"));
  EXPECT_THAT(refused_header(R"({"a":1})"), AllOf(HasSubstr("the number 1"), HasSubstr("\"a\"")));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[0]}})"),
              HasSubstr("\"a\" lacks dtype, shape or data_offsets"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":null}})"),
              HasSubstr("null at \"x\""));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","dtype":"U8"}})"), HasSubstr("at \"dtype\""));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[0,0]}})"),
              AllOf(HasSubstr("\"F8_E4M3\""), HasSubstr("expected F64")));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[[0]],"data_offsets":[0,0]}})"),
              HasSubstr("an array at \"shape\""));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,0]}})"),
              HasSubstr("the number -1"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}})"),
              HasSubstr("the number 1.0"));
  EXPECT_THAT(
      refused_header(R"({"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]}})"),
      HasSubstr("the number 9223372036854775808"));
  EXPECT_THAT(refused_header(R"({"__metadata__":{"a":1}})"), HasSubstr("the number 1"));
  EXPECT_THAT(refused_header(R"({"__metadata__":{"a":"1","a":"2"}})"), HasSubstr("\"a\" twice"));
  EXPECT_THAT(refused_header(R"({"__metadata__":{},"__metadata__":{}})"), HasSubstr("twice"));
}

TEST(Safetensors, RefusesDuplicateNames) {
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                             R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                             "xy"),
              HasSubstr("two tensors are named \"a\""));
}

TEST(Safetensors, RefusesRangesThatDoNotFit) {
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", "xy"),
              HasSubstr("[0, 3], but the file holds 2 bytes of data; the copy looks cut short"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[2,1]}})", "xy"),
              HasSubstr("[2, 1]"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", "x"),
              HasSubstr("expected [begin, end]"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,2]}})", "xy"),
              HasSubstr("do not fit shape [1] and dtype f32"));
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],)"
                             R"("data_offsets":[0,0]}})"),
              HasSubstr("do not fit shape"));
}

TEST(Safetensors, RefusesHolesAndOverlap) {
  const auto two = [](const char* first, const char* second) {
    return R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + std::string(first) +
           R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + second + "}}";
  };
  EXPECT_THAT(refused_header(two("[0,2]", "[1,3]"), "xyz"),
              HasSubstr("\"b\" begins at byte 1 of the data, expected 2"));
  EXPECT_THAT(refused_header(two("[0,2]", "[3,5]"), "vwxyz"), HasSubstr("a hole"));
  EXPECT_THAT(refused_header(two("[1,3]", "[3,5]"), "vwxyz"), HasSubstr("a hole"));
  EXPECT_THAT(refused_header(two("[0,2]", "[2,4]"), "vwxyz"),
              HasSubstr("5 bytes of data, but its tensors cover only 4"));
}

TEST(Safetensors, RefusesAHeaderLongerThanTheFile) {
  std::string file = file_of("{}", "");
  file[0] = 100;
  EXPECT_THAT(refusal(file), HasSubstr("10 bytes, but its header alone should have 100"));
  file.replace(0, 8, 8, '\x7f');
  EXPECT_THAT(refusal(file), HasSubstr("does not start as a safetensors file"));
}

TEST(Safetensors, SurvivesDeepNesting) {
  EXPECT_THAT(refused_header("{\"a\":" + std::string(1 << 20, '[')), HasSubstr("an array"));
}

// Each would cost many times its bytes.
TEST(Safetensors, RefusesMoreThanAModelHas) {
  const auto repeated = [](const std::string& text, int count) {
    std::string all;
    for (int i = 0; i < count; ++i) {
      all += (i == 0 ? "" : ",") + text;
    }
    return all;
  };
  EXPECT_THAT(refused_header(R"({"a":{"dtype":"U8","shape":[)" + repeated("0", 9) +
                             R"(],"data_offsets":[0,0]}})"),
              HasSubstr("more than 8 numbers in one list at \"shape\""));
  EXPECT_THAT(
      refused_header(
          "{" + repeated(R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})", (1 << 16) + 1) +
          "}"),
      HasSubstr("more than 65536 tensors"));
  std::string metadata = R"({"__metadata__":{"a":"")";
  for (int i = 0; i < 1 << 16; ++i) {
    metadata += ",\"" + std::to_string(i) + "\":\"\"";
  }
  EXPECT_THAT(refused_header(metadata + "}}"), HasSubstr("more than 65536 metadata entries"));
}

TEST(Safetensors, RefusesEveryTruncation) {
  const std::string whole = file_of(kTwoTensors, "1234567");
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  for (size_t length = 0; length < whole.size(); ++length) {
    // Removed first: some file systems wait for the disk when a file is overwritten.
    std::filesystem::remove(path);
    test::write_file(path, whole.substr(0, length));
    EXPECT_THROW(read_safetensors(path), std::runtime_error) << length;
  }
}

TEST(Safetensors, ReadsOrRefusesWhateverIsFlipped) {
  const std::string whole = file_of(kTwoTensors, "1234567");
  const test::TempFolder folder;
  const std::string path = folder.path("a.safetensors");
  std::mt19937 random(1);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = whole;
    for (int flips = 0; flips < 1 + round % 3; ++flips) {
      damaged[random() % damaged.size()] = static_cast<char>(random());
    }
    std::filesystem::remove(path);
    test::write_file(path, damaged);
    try {
      for (const StoredTensor& tensor : read_safetensors(path).tensors) {
        std::vector<std::byte> bytes;
        tensor.copy_to(bytes);
        EXPECT_LE(bytes.size(), 7u);
      }
    } catch (const std::runtime_error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace rwkv
