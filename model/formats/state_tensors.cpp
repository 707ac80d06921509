#include "model/formats/state_tensors.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <stdexcept>
#include <utility>

#include "data/atomic_file.h"
#include "data/number_text.h"
#include "model/formats/checks.h"

namespace rwkv {
namespace {

constexpr std::string_view kWkv = ".att.wkv";
constexpr std::array<std::string_view, 3> kOwnNames = {kWkv, ".att.shift", ".ffn.shift"};
constexpr std::array<std::string_view, 1> kTimeStateNames = {".att.time_state"};

template <size_t Size>
bool holds_only(const WeightFile& file, const std::array<std::string_view, Size>& endings) {
  return !file.tensors.empty() && std::ranges::all_of(file.tensors, [&](const auto& tensor) {
    return std::ranges::any_of(
        endings, [&](std::string_view ending) { return tensor.name.ends_with(ending); });
  });
}

// Ours to [value, key] or back: both are N.
void swap_value_and_key(StoredTensor& tensor) {
  std::swap(tensor.shape[1], tensor.shape[2]);
  std::swap(tensor.strides[1], tensor.strides[2]);
}

// The tensors of ours in the order of a buffer, as views of `numbers`.
std::vector<StoredTensor> buffer_tensors(const StateSizes& sizes,
                                         std::span<const std::byte> numbers) {
  std::vector<StoredTensor> tensors;
  int64_t offset = 0;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& shape) {
    tensors.push_back({.name = name,
                       .shape = shape,
                       .strides = contiguous_strides(shape),
                       .storage = numbers,
                       .offset = offset});
    offset += tensors.back().num_elements();
  };
  for (int64_t layer = 0; layer < sizes.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    add(block + ".ffn.shift", {sizes.n_embd});
    add(block + ".att.shift", {sizes.n_embd});
    add(block + std::string(kWkv), sizes.wkv_shape);
    if (sizes.version == "rwkv7") {
      swap_value_and_key(tensors.back());
    }
  }
  return tensors;
}

}  // namespace

StateKind state_kind(const WeightFile& file) {
  return holds_only(file, kOwnNames)         ? StateKind::kOwn
         : holds_only(file, kTimeStateNames) ? StateKind::kTimeState
                                             : StateKind::kNone;
}

const std::string& version_of_state(const WeightFile& state) {
  const auto version = state.metadata.find(kStateVersion);
  if (version == state.metadata.end()) {
    throw std::runtime_error(state.path +
                             ": does not say of which version its state is, expected \"" +
                             kStateVersion + "\" in its metadata; was it rewritten?");
  }
  return version->second;
}

std::vector<StoredTensor> as_time_state(const WeightFile& state) {
  std::vector<StoredTensor> result;
  for (StoredTensor tensor : state.tensors) {
    if (!tensor.name.ends_with(kWkv)) {
      continue;
    }
    if (tensor.shape.size() != 3) {
      throw std::runtime_error(state.path + ": " + tensor.name + " is " + shape_text(tensor.shape) +
                               ", expected [heads, N, N]: RWKV-LM has no time_state of a version "
                               "without heads; keep the state as .safetensors");
    }
    tensor.name.replace(tensor.name.size() - kWkv.size(), kWkv.size(), kTimeStateNames[0]);
    swap_value_and_key(tensor);
    result.push_back(std::move(tensor));
  }
  return result;
}

bool is_state_buffer(const std::string& path) {
  return std::filesystem::path(path).extension() == ".bin";
}

StateSizes state_sizes(const WeightFile& state) {
  const auto find = [&](const std::string& name) -> const StoredTensor& {
    const StoredTensor* tensor = state.find(name);
    if (tensor == nullptr) {
      throw std::runtime_error(state.path + ": " + name + " is missing; the state is not whole");
    }
    return *tensor;
  };
  const StoredTensor& wkv = find("blocks.0.att.wkv");
  const size_t expected_rank = version_of_state(state) == "rwkv4" ? 2 : 3;
  if (wkv.shape.size() != expected_rank) {
    throw std::runtime_error(state.path + ": " + wkv.name + " is " + shape_text(wkv.shape) +
                             ", expected " + (expected_rank == 2 ? "[3, A]" : "[heads, N, N]") +
                             " of a state of " + in_quotes(version_of_state(state)));
  }
  return {.version = version_of_state(state),
          .n_layer = std::ranges::count_if(
              state.tensors, [](const auto& tensor) { return tensor.name.ends_with(kWkv); }),
          .n_embd = find("blocks.0.att.shift").num_elements(),
          .wkv_shape = wkv.shape};
}

WeightFile read_state_buffer(const std::string& path, const StateSizes& sizes) {
  auto mapping = std::make_shared<const MappedFile>(path);
  std::vector<StoredTensor> tensors = buffer_tensors(sizes, mapping->bytes());
  uint64_t expected = 0;
  for (const StoredTensor& tensor : tensors) {
    expected += static_cast<uint64_t>(tensor.num_elements() * size_of(tensor.dtype));
  }
  if (mapping->bytes().size() != expected) {
    throw std::runtime_error(path + ": " + grouped(mapping->bytes().size()) +
                             " bytes, but rwkv.cpp's state of " + sizes.version + " with " +
                             std::to_string(sizes.n_layer) + " layers of " +
                             std::to_string(sizes.n_embd) + " channels has " + grouped(expected) +
                             "; is it of another model, or cut short?");
  }
  return {.path = path,
          .format = "rwkv.cpp state",
          .tensors = std::move(tensors),
          .metadata = {{kStateVersion, sizes.version}},
          .mapping = std::move(mapping)};
}

void write_state_buffer(const std::string& path,
                        std::span<const TensorToWrite> state,
                        const StateSizes& sizes) {
  std::vector<std::byte> numbers;
  for (StoredTensor place : buffer_tensors(sizes, {})) {
    const auto tensor = std::ranges::find(state, place.name, &TensorToWrite::name);
    if (tensor == state.end() || tensor->dtype != place.dtype || tensor->shape != place.shape) {
      throw std::runtime_error(
          path + ": nothing was written, " + place.name + " is " +
          (tensor == state.end()
               ? "missing"
               : std::string(name_of(tensor->dtype)) + " " + shape_text(tensor->shape)) +
          ", expected f32 " + shape_text(place.shape) + "; the state is not whole");
    }
    // Swapping is its own inverse.
    place.storage = tensor->data;
    place.offset = 0;
    place.copy_to(numbers);
  }
  AtomicFile file(path);
  file.write(numbers);
  file.commit();
}

}  // namespace rwkv
