#include "model/formats/format_registry.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include "data/mapped_file.h"
#include "model/formats/checks.h"
#include "model/formats/piece_files.h"
#include "model/formats/pth.h"
#include "model/formats/safetensors.h"
#include "model/formats/state_tensors.h"

namespace rwkv {
namespace {

using Metadata = std::map<std::string, std::string>;

struct WeightFormat {
  std::string_view name;
  std::string_view ending;
  std::string_view other_ending;  // empty if there is none
  bool (*recognises)(std::span<const std::byte> file);
  WeightFile (*read)(const std::string& path);
  void (*write)(const std::string& path,
                std::span<const TensorToWrite> tensors,
                const Metadata& metadata);
};

constexpr WeightFormat kFormats[] = {
    {.name = "pth",
     .ending = ".pth",
     .other_ending = "",
     .recognises = is_pth,
     .read = read_pth,
     .write = [](const std::string& path,
                 std::span<const TensorToWrite> tensors,
                 const Metadata&) { write_pth(path, tensors); }},
    {.name = "safetensors",
     .ending = ".safetensors",
     .other_ending = ".st",
     .recognises = is_safetensors,
     .read = read_safetensors,
     .write = [](const std::string& path,
                 std::span<const TensorToWrite> tensors,
                 const Metadata& metadata) { write_safetensors(path, tensors, metadata); }},
};

// What people give in place of weights, by its first bytes.
struct KnownMistake {
  std::string_view start;
  std::string_view is;
  std::string_view advice;
};

constexpr KnownMistake kMistakes[] = {
    {"version https://git-lfs", "a Git LFS pointer, not the weights", "run git lfs pull"},
    {"<!DOCTYPE", "a web page, not the weights", "download the file itself"},
    {"<!doctype", "a web page, not the weights", "download the file itself"},
    {"<html", "a web page, not the weights", "download the file itself"},
    {"GGUF", "a GGUF file", "use the .pth or .safetensors it was made from"},
    // 0x67676d66 and 0x67676d6c, low byte first.
    {"fmgg", "an rwkv.cpp (ggml) file", "use the .pth or .safetensors it was made from"},
    {"lmgg", "a ggml file", "use the .pth or .safetensors it was made from"},
    {"tjgg", "a ggml file", "use the .pth or .safetensors it was made from"},
    {"\x1f\x8b", "compressed with gzip", "unpack it with gunzip"},
    {"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with zstd -d"},
    {"\x80\x02", "a bare Python pickle", "save it with torch.save"},
    {"\x80\x03", "a bare Python pickle", "save it with torch.save"},
    {"\x80\x04", "a bare Python pickle", "save it with torch.save"},
    {"\x80\x05", "a bare Python pickle", "save it with torch.save"},
    {"\x93NUMPY", "a NumPy array", "expected named tensors"},
    {"{", "JSON text", "an index of shards names the files that hold the weights"},
};

constexpr size_t kShownBytes = 8;

[[noreturn]] void refuse(const std::string& path, std::span<const std::byte> file) {
  constexpr const char* kExpected = "expected .pth (zip or legacy) or safetensors";
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (text.empty()) {
    throw std::runtime_error(path + ": is empty, " + kExpected + "; the copy looks cut short");
  }
  // Web pages may begin with blank lines.
  const std::string_view trimmed =
      text.substr(std::min(text.find_first_not_of(" \t\r\n"), text.size()));
  for (const KnownMistake& mistake : kMistakes) {
    if (trimmed.starts_with(mistake.start)) {
      throw std::runtime_error(path + ": is " + std::string(mistake.is) + ", " + kExpected + "; " +
                               std::string(mistake.advice));
    }
  }
  throw std::runtime_error(
      path + ": first bytes " + in_quotes(text.substr(0, kShownBytes)) + "; " + kExpected +
      (is_state_buffer(path) ? "; a state of rwkv.cpp's does not say of which model it is: "
                               "give it to --state or init.state, beside that model"
                             : ""));
}

const WeightFormat* format_for_ending(const std::string& path) {
  const std::string ending = std::filesystem::path(path).extension().string();
  const auto* found = std::find_if(std::begin(kFormats), std::end(kFormats), [&](const auto& row) {
    return !ending.empty() && (ending == row.ending || ending == row.other_ending);
  });
  return found == std::end(kFormats) ? nullptr : found;
}

const WeightFormat& known_format_for_ending(const std::string& path) {
  const WeightFormat* format = format_for_ending(path);
  if (format == nullptr) {
    throw std::invalid_argument(path + ": the ending \"" +
                                std::filesystem::path(path).extension().string() +
                                "\" names no weight format; use .pth, .safetensors or .st");
  }
  return *format;
}

}  // namespace

WeightFile read_weights(const std::string& path) {
  std::string file_path = path;
  if (std::filesystem::is_directory(path)) {
    file_path = (std::filesystem::path(path) / "model.safetensors").string();
    if (has_piece_files(path, "model")) {
      return PieceFiles(path, "model").joined();
    }
    if (!std::filesystem::exists(file_path)) {
      throw std::runtime_error(path +
                               ": is a folder without model.safetensors, expected a checkpoint; "
                               "give the path of a checkpoint or of a weight file");
    }
  }
  const MappedFile file(file_path);
  for (const WeightFormat& format : kFormats) {
    if (format.recognises(file.bytes())) {
      return format.read(file_path);
    }
  }
  refuse(file_path, file.bytes());
}

void write_weights(const std::string& path,
                   std::span<const TensorToWrite> tensors,
                   const std::map<std::string, std::string>& metadata) {
  known_format_for_ending(path).write(path, tensors, metadata);
}

void check_weights_path(const std::string& path) {
  known_format_for_ending(path);
}

}  // namespace rwkv
