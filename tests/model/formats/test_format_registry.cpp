#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/format_registry.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using std::string_literals::operator""s;

std::string refusal(const std::string& content) {
  const test::TempFolder folder;
  test::write_file(folder.path("rwkv.pth"), content);
  const std::string text = THROWN_TEXT(std::runtime_error, read_weights(folder.path("rwkv.pth")));
  EXPECT_THAT(text, HasSubstr("rwkv.pth: "));
  EXPECT_THAT(text, HasSubstr("expected .pth (zip or legacy) or safetensors"));
  return text;
}

TEST(FormatRegistry, TellsFormatsByContentAndNotByName) {
  const test::TempFolder folder;
  const std::vector<std::byte> data(8, std::byte{1});
  const std::vector<TensorToWrite> tensors = {{.name = "w", .shape = {2}, .data = data}};
  const auto format_of = [&](const char* name) {
    write_weights(folder.path(name), tensors, {});
    std::filesystem::rename(folder.path(name), folder.path("weights.bin"));
    return read_weights(folder.path("weights.bin")).format;
  };
  EXPECT_EQ(format_of("a.pth"), "pth");
  EXPECT_EQ(format_of("a.safetensors"), "safetensors");
  EXPECT_EQ(format_of("a.st"), "safetensors");
}

TEST(FormatRegistry, SaysWhereAStateOfRwkvCppGoes) {
  const test::TempFolder folder;
  test::write_file(folder.path("s.bin"), std::string(64, '\1'));
  EXPECT_THAT(
      THROWN_TEXT(std::runtime_error, read_weights(folder.path("s.bin"))),
      AllOf(HasSubstr("s.bin: first bytes"), HasSubstr("give it to --state or init.state")));
}

TEST(FormatRegistry, ReadsTheWeightsOfACheckpointFolder) {
  const test::TempFolder folder;
  const std::vector<std::byte> data(8, std::byte{1});
  const std::vector<TensorToWrite> tensors = {{.name = "w", .shape = {2}, .data = data}};
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_weights(folder.path())),
              HasSubstr("is a folder without model.safetensors"));
  write_weights(folder.path("model.safetensors"), tensors, {{"a", "b"}});
  const WeightFile file = read_weights(folder.path());
  EXPECT_EQ(file.path, folder.path("model.safetensors"));
  EXPECT_EQ(file.metadata.at("a"), "b");
}

TEST(FormatRegistry, RefusesEndingsItCannotWrite) {
  for (const char* path : {"a.bin", "a", "a.PTH", ".pth", "folder.pth/a"}) {
    EXPECT_THAT(THROWN_TEXT(std::invalid_argument, check_weights_path(path)),
                AllOf(HasSubstr(path), HasSubstr("use .pth, .safetensors or .st")));
    EXPECT_THROW(write_weights(path, {}, {}), std::invalid_argument);
  }
  EXPECT_NO_THROW(check_weights_path("runs/a.b.pth"));
  EXPECT_NO_THROW(check_weights_path("a.safetensors"));
  EXPECT_NO_THROW(check_weights_path("a.st"));
}

TEST(FormatRegistry, SaysWhatAnUnknownFileIs) {
  EXPECT_THAT(refusal(""), HasSubstr("is empty"));
  EXPECT_THAT(refusal("abc\x01\xff"), HasSubstr("first bytes \"abc\\x01\\xff\""));
  EXPECT_THAT(refusal("version https://git-lfs.github.com/spec/v1\noid sha256:1\n"),
              AllOf(HasSubstr("is a Git LFS pointer, not the weights"), HasSubstr("git lfs pull")));
  EXPECT_THAT(refusal("\n\n<!DOCTYPE html><html>"), HasSubstr("is a web page"));
  EXPECT_THAT(refusal("<html>"), HasSubstr("is a web page"));
  EXPECT_THAT(refusal("GGUF\x03\x00\x00\x00"s), HasSubstr("is a GGUF file"));
  EXPECT_THAT(refusal("\x1f\x8b\x08"), HasSubstr("is compressed with gzip"));
  EXPECT_THAT(refusal("\x28\xb5\x2f\xfd"), HasSubstr("is compressed with zstd"));
  EXPECT_THAT(refusal("\x80\x04\x95\x10"), HasSubstr("is a bare Python pickle"));
  EXPECT_THAT(refusal("\x93NUMPY\x01"), HasSubstr("is a NumPy array"));
  EXPECT_THAT(refusal("{\"weight_map\": {}}"), HasSubstr("is JSON text"));
}

TEST(FormatRegistry, RefusesFilesOfRwkvCppByName) {
  const std::string path = test::find_test_data("rwkv_cpp_tiny/tiny-rwkv-4v0-660K-FP32.bin");
  SKIP_WITHOUT(path);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_weights(path)),
              HasSubstr("is an rwkv.cpp (ggml) file"));
}

TEST(FormatRegistry, NamesAFileThatIsNotThere) {
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, read_weights("/nonexistent/a.pth")),
              HasSubstr("/nonexistent/a.pth: cannot be opened"));
}

}  // namespace
}  // namespace rwkv
