#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <optional>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "model/formats/format_registry.h"
#include "model/formats/pth.h"
#include "model/formats/state_tensors.h"
#include "train/commands/commands.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery convert runs/mine mine.pth --dtype bf16";

bool is_float(WeightDtype dtype) {
  return dtype == WeightDtype::kF32 || dtype == WeightDtype::kF16 || dtype == WeightDtype::kBf16 ||
         dtype == WeightDtype::kF64;
}

WeightDtype parse_target(const std::string& name) {
  if (name == "fp32") {
    return WeightDtype::kF32;
  }
  if (name == "fp16") {
    return WeightDtype::kF16;
  }
  if (name == "bf16") {
    return WeightDtype::kBf16;
  }
  throw std::invalid_argument("--dtype " + name + ": expected fp32, bf16 or fp16");
}

// What float tensors become; nothing: they stay as they are.
std::optional<WeightDtype> target_of(const cxxopts::ParseResult& parsed, bool to_buffer) {
  if (to_buffer && parsed.count("dtype") > 0) {
    throw std::invalid_argument(
        "--dtype has no use with .bin: rwkv.cpp's state buffer is fp32; leave it out");
  }
  return to_buffer ? std::optional(WeightDtype::kF32)
         : parsed.count("dtype") > 0
             ? std::optional(parse_target(parsed["dtype"].as<std::string>()))
             : std::nullopt;
}

// What was written must read back the same.
void compare(const WeightFile& written, std::span<const TensorToWrite> expected) {
  const std::string& path = written.path;
  verify_checksums(written);
  if (written.tensors.size() != expected.size()) {
    throw std::runtime_error(path + ": holds " + std::to_string(written.tensors.size()) +
                             " tensors after writing " + std::to_string(expected.size()));
  }
  std::map<std::string_view, const StoredTensor*> by_name;
  for (const StoredTensor& tensor : written.tensors) {
    by_name[tensor.name] = &tensor;
  }
  std::vector<std::byte> bytes;
  for (const TensorToWrite& tensor : expected) {
    const auto found = by_name.find(tensor.name);
    const StoredTensor* stored = found == by_name.end() ? nullptr : found->second;
    bytes.clear();
    if (stored != nullptr) {
      stored->copy_to(bytes);
    }
    if (stored == nullptr || stored->dtype != tensor.dtype || stored->shape != tensor.shape ||
        !std::ranges::equal(bytes, tensor.data)) {
      throw std::runtime_error(path + ": " + tensor.name +
                               " does not read back as it was written; is the disk at fault?");
    }
  }
}

}  // namespace

int convert_command(int argc, char** argv) {
  cxxopts::Options options("rookery convert",
                           "Writes the weights of FROM (a run, a checkpoint folder, a .pth or "
                           ".safetensors file)\nto TO (.pth or .safetensors), reads them back and "
                           "compares.\nA state of --save-state becomes, as .pth, RWKV-LM's "
                           "time_state, without the shifted rows;\nas .bin, rwkv.cpp's state "
                           "buffer.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("from", "what to read", cxxopts::value<std::string>());
  add("to", "what to write", cxxopts::value<std::string>());
  add("dtype", "fp32, bf16 or fp16; default: as they are", cxxopts::value<std::string>());
  options.parse_positional({"from", "to"});
  options.positional_help("FROM TO");
  const auto parsed = parse_options(options, argc, argv, kExample, {"from", "to"});
  if (!parsed) {
    return 0;
  }
  const std::string to = (*parsed)["to"].as<std::string>();
  const bool to_buffer = is_state_buffer(to);
  if (!to_buffer) {
    check_weights_path(to);
  }
  const std::optional<WeightDtype> target = target_of(*parsed, to_buffer);
  const std::string from = find_model((*parsed)["from"].as<std::string>());
  require_whole_model(from);
  WeightFile file = read_weights(from);
  if (std::filesystem::exists(to) && std::filesystem::equivalent(file.path, to)) {
    throw std::invalid_argument(to + ": is the file to read; give another name to write");
  }

  if (file.tensors.empty()) {
    throw std::runtime_error(file.path + ": holds no tensors, expected the weights of a model");
  }
  verify_checksums(file);
  if (to_buffer && state_kind(file) != StateKind::kOwn) {
    throw std::invalid_argument(to + ": the ending names rwkv.cpp's state buffer, but " +
                                file.path +
                                " holds no state by --save-state; use .pth, .safetensors or .st");
  }
  if (state_kind(file) == StateKind::kOwn && std::filesystem::path(to).extension() == ".pth") {
    file.tensors = as_time_state(file);
  }

  std::vector<std::vector<std::byte>> contents(file.tensors.size());
  std::vector<TensorToWrite> tensors;
  for (size_t i = 0; i < file.tensors.size(); ++i) {
    const StoredTensor& tensor = file.tensors[i];
    tensor.copy_to(contents[i]);
    WeightDtype dtype = tensor.dtype;
    if (target && is_float(dtype) && dtype != *target) {
      contents[i] = convert_elements(contents[i], dtype, *target);
      dtype = *target;
    }
    tensors.push_back(
        {.name = tensor.name, .dtype = dtype, .shape = tensor.shape, .data = contents[i]});
  }
  const std::optional<StateSizes> sizes =
      to_buffer ? std::optional(state_sizes(file)) : std::nullopt;
  if (sizes) {
    write_state_buffer(to, tensors, *sizes);
  } else {
    write_weights(to, tensors, file.metadata);
  }
  try {
    compare(sizes ? read_state_buffer(to, *sizes) : read_weights(to), tensors);
  } catch (...) {
    // What cannot be trusted must not lie there as if it could.
    std::error_code ignored;
    std::filesystem::remove(to, ignored);
    throw;
  }
  std::cout << to << ": " << tensors.size() << " tensors, " << std::filesystem::file_size(to)
            << " bytes\n";
  return 0;
}

}  // namespace rwkv
