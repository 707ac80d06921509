#include "model/formats/state_tensors.h"

#include <algorithm>
#include <array>
#include <stdexcept>
#include <utility>

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

}  // namespace

StateKind state_kind(const WeightFile& file) {
  return holds_only(file, kOwnNames)         ? StateKind::kOwn
         : holds_only(file, kTimeStateNames) ? StateKind::kTimeState
                                             : StateKind::kNone;
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
    std::swap(tensor.shape[1], tensor.shape[2]);
    std::swap(tensor.strides[1], tensor.strides[2]);
    result.push_back(std::move(tensor));
  }
  return result;
}

}  // namespace rwkv
