#include <cstring>
#include <filesystem>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/content_hash.h"
#include "model/formats/format_registry.h"
#include "model/formats/piece_files.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

// Elements first, first + 1, ... as a tensor's bytes.
std::vector<float> counted(int64_t first, int64_t count) {
  std::vector<float> values(static_cast<size_t>(count));
  std::iota(values.begin(), values.end(), static_cast<float>(first));
  return values;
}

// A share of a tensor whose element i is i.
struct Share {
  std::string name;
  std::vector<int64_t> shape;
  int64_t begin;
  int64_t end;
};

WrittenFile write_shares(const test::TempFolder& folder,
                         ProcessPlace place,
                         const std::vector<Share>& shares) {
  std::vector<std::vector<float>> values;
  std::vector<PieceToWrite> pieces;
  for (const Share& share : shares) {
    values.push_back(counted(share.begin, share.end - share.begin));
  }
  for (size_t i = 0; i < shares.size(); ++i) {
    pieces.push_back({.name = shares[i].name,
                      .dtype = WeightDtype::kF32,
                      .shape = shares[i].shape,
                      .begin = shares[i].begin,
                      .end = shares[i].end,
                      .data = std::as_bytes(std::span(values[i]))});
  }
  return write_pieces(folder.path(piece_file_name("model", place)), pieces, {{"a", "b"}});
}

// Two tensors, cut between three processes: one inside a row, one inside nothing at all.
void write_three(const test::TempFolder& folder) {
  write_shares(folder, {0, 3}, {{"x", {3, 5}, 0, 7}});
  write_shares(folder, {1, 3}, {{"x", {3, 5}, 7, 8}, {"y", {2}, 0, 0}});
  write_shares(folder, {2, 3}, {{"x", {3, 5}, 8, 15}, {"y", {2}, 0, 2}});
}

std::string refusal(const test::TempFolder& folder) {
  return THROWN_TEXT(std::runtime_error, PieceFiles(folder.path(), "model"));
}

TEST(PieceFiles, GiveAnyRangeOfATensor) {
  const test::TempFolder folder;
  write_three(folder);
  const PieceFiles files(folder.path(), "model");
  ASSERT_EQ(files.tensors().size(), 2u);
  const PieceFiles::Tensor* x = files.find("x");
  ASSERT_NE(x, nullptr);
  EXPECT_THAT(x->shape, ElementsAre(3, 5));
  for (int64_t begin = 0; begin <= 15; ++begin) {
    for (int64_t end = begin; end <= 15; ++end) {
      std::vector<float> values(static_cast<size_t>(end - begin));
      files.read(*x, begin, end, std::as_writable_bytes(std::span(values)));
      EXPECT_EQ(values, counted(begin, end - begin)) << begin << " to " << end;
    }
  }
  std::vector<float> one(1);
  EXPECT_THROW(files.read(*x, 15, 16, std::as_writable_bytes(std::span(one))),
               std::invalid_argument);
  EXPECT_EQ(files.find("x[0:7]"), nullptr);
}

TEST(PieceFiles, AreOneModelToWhoeverReadsWeights) {
  const test::TempFolder folder;
  write_three(folder);
  const WeightFile file = read_weights(folder.path());
  EXPECT_EQ(file.path, folder.path());
  EXPECT_EQ(file.format, "safetensors, 3 files");
  EXPECT_THAT(file.metadata, ElementsAre(Pair("a", "b")));
  for (const auto& [name, shape, size] :
       {std::tuple{"x", std::vector<int64_t>{3, 5}, 15}, {"y", std::vector<int64_t>{2}, 2}}) {
    const StoredTensor* tensor = file.find(name);
    ASSERT_NE(tensor, nullptr) << name;
    EXPECT_EQ(tensor->shape, shape);
    std::vector<float> values(static_cast<size_t>(size));
    tensor->copy_to(std::as_writable_bytes(std::span(values)));
    EXPECT_EQ(values, counted(0, size)) << name;
  }
}

TEST(PieceFiles, OfOneProcessAreAFileOfWholeTensors) {
  const test::TempFolder folder;
  // Here a name in brackets is a name.
  write_shares(folder, {}, {{"x", {2, 3}, 0, 6}, {"y[0:1]", {4}, 0, 4}});
  EXPECT_THAT(folder.files(), ElementsAre("model.safetensors"));
  EXPECT_FALSE(has_piece_files(folder.path(), "model"));
  const PieceFiles files(folder.path(), "model");
  EXPECT_EQ(files.path(), folder.path("model.safetensors"));
  EXPECT_THAT(files.find("x")->shape, ElementsAre(2, 3));
  EXPECT_THAT(files.find("y[0:1]")->shape, ElementsAre(4));
  EXPECT_FALSE(read_weights(folder.path()).metadata.contains("rookery.shapes"));
}

TEST(PieceFiles, KnowTheirChecksumWithoutReadingThemBack) {
  const test::TempFolder folder;
  const WrittenFile written = write_shares(folder, {0, 2}, {{"x", {1 << 19}, 0, 400'001}});
  const std::string content = test::read_file(folder.path("model.00000-of-00002.safetensors"));
  EXPECT_EQ(written.bytes, content.size());
  EXPECT_EQ(written.checksum, content_hash(std::as_bytes(std::span(content))));
}

TEST(PieceFiles, NamesTheFileThatIsMissing) {
  const test::TempFolder folder;
  write_three(folder);
  std::filesystem::remove(folder.path("model.00001-of-00003.safetensors"));
  EXPECT_THAT(refusal(folder),
              AllOf(HasSubstr("model.00001-of-00003.safetensors: is missing, expected 3 files"),
                    HasSubstr("Copy it again")));
}

TEST(PieceFiles, RefuseFilesOfTwoSaves) {
  const test::TempFolder folder;
  write_three(folder);
  write_shares(folder, {0, 2}, {{"x", {3, 5}, 0, 7}});
  EXPECT_THAT(refusal(folder), HasSubstr("holds files model of 2 and of 3 processes"));
}

TEST(PieceFiles, NameTheElementsThatAreNowhere) {
  const test::TempFolder folder;
  write_shares(folder, {0, 2}, {{"x", {3, 5}, 0, 6}});
  write_shares(folder, {1, 2}, {{"x", {3, 5}, 7, 15}});
  EXPECT_THAT(refusal(folder),
              AllOf(HasSubstr("model.*-of-00002.safetensors: elements [6:7] of x [3, 5]"),
                    HasSubstr("are in none of the files")));
  write_shares(folder, {1, 2}, {{"x", {3, 5}, 6, 14}});
  EXPECT_THAT(refusal(folder), HasSubstr("elements [14:15] of x [3, 5]"));
}

TEST(PieceFiles, NameTheElementsThatAreThereTwice) {
  const test::TempFolder folder;
  write_shares(folder, {0, 2}, {{"x", {3, 5}, 0, 8}});
  write_shares(folder, {1, 2}, {{"x", {3, 5}, 7, 15}});
  EXPECT_THAT(refusal(folder),
              AllOf(HasSubstr("model.00001-of-00002.safetensors: elements [7:15] of x"),
                    HasSubstr("a second time")));
  write_shares(folder, {0, 2}, {{"x", {3, 5}, 0, 15}});
  write_shares(folder, {1, 2}, {{"x", {3, 5}, 0, 15}});
  EXPECT_THAT(refusal(folder), HasSubstr("elements [0:15] of x are there a second time"));
}

TEST(PieceFiles, RefusePiecesThatDisagree) {
  const test::TempFolder folder;
  write_shares(folder, {0, 2}, {{"x", {3, 5}, 0, 8}});
  write_shares(folder, {1, 2}, {{"x", {5, 3}, 8, 15}});
  EXPECT_THAT(refusal(folder),
              AllOf(HasSubstr("model.00001-of-00002.safetensors: \"x[8:15]\""),
                    HasSubstr("[5, 3], but "),
                    HasSubstr("has f32 [3, 5]")));
}

TEST(PieceFiles, RefuseAPieceThatItsFileDoesNotExplain) {
  const test::TempFolder folder;
  const std::vector<float> values = counted(0, 4);
  const auto write = [&](const std::string& name, const std::map<std::string, std::string>& meta) {
    const std::vector<TensorToWrite> tensors = {{.name = name,
                                                 .dtype = WeightDtype::kF32,
                                                 .shape = {4},
                                                 .data = std::as_bytes(std::span(values))}};
    write_safetensors(folder.path("model.00000-of-00002.safetensors"), tensors, meta);
  };
  write_shares(folder, {1, 2}, {{"x", {8}, 4, 8}});
  write("x[0:4]", {});
  EXPECT_THAT(refusal(folder), HasSubstr("is a piece of a tensor that has no shape"));
  write("x[0:4]", {{"rookery.shapes", R"({"x": [3]})"}});
  EXPECT_THAT(refusal(folder), HasSubstr("is a piece of a tensor that is [3]"));
  write("x[0:3]", {{"rookery.shapes", R"({"x": [8]})"}});
  EXPECT_THAT(refusal(folder), HasSubstr("is [4], expected [3] by its name"));
  write("x[0:4]", {{"rookery.shapes", R"({"x": 8})"}});
  EXPECT_THAT(refusal(folder), HasSubstr("(rookery.shapes): is "));
  write("x[0:4]", {{"rookery.shapes", R"({"x": [8]})"}});
  EXPECT_EQ(PieceFiles(folder.path(), "model").tensors().size(), 1u);
}

TEST(WritePieces, RefusesElementsThatATensorHasNot) {
  const test::TempFolder folder;
  EXPECT_THAT(
      THROWN_TEXT(std::invalid_argument, write_shares(folder, {0, 2}, {{"x", {3, 5}, 14, 16}})),
      HasSubstr("x is [3, 5] and has no elements [14:16]"));
}

}  // namespace
}  // namespace rwkv
