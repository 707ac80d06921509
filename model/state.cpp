#include "model/state.h"

#include <ATen/ATen.h>

namespace rwkv {
namespace {

template <typename Function>
State map_tensors(const State& state, const Function& function) {
  State result;
  result.layers.reserve(state.layers.size());
  for (const LayerState& layer : state.layers) {
    result.layers.push_back(
        {function(layer.att_shift_BC), function(layer.ffn_shift_BC), function(layer.wkv)});
  }
  return result;
}

}  // namespace

State State::clone() const {
  return map_tensors(*this, [](const at::Tensor& tensor) { return tensor.clone(); });
}

State State::rows(int64_t begin, int64_t end) const {
  return map_tensors(*this, [&](const at::Tensor& tensor) { return tensor.slice(0, begin, end); });
}

State State::detach() const {
  return map_tensors(*this, [](const at::Tensor& tensor) { return tensor.detach(); });
}

}  // namespace rwkv
