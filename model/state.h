// The recurrent state of a model: what a sequence hands to its continuation.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace rwkv {

// One layer. The shifted rows are the normalised inputs (ln1, ln2) of the last token, in the
// activations' dtype; wkv is fp32 (fp64 in an fp64 model), of a shape that the version defines:
// RWKV-4 [B, 3, A], rows a, b, p of model/ops/wkv4.h.
struct LayerState {
  at::Tensor att_shift_BC;
  at::Tensor ffn_shift_BC;
  at::Tensor wkv;
};

struct State {
  std::vector<LayerState> layers;

  // A copy that shares no memory.
  State clone() const;
  // Batch rows [begin, end), as views.
  State rows(int64_t begin, int64_t end) const;
  // The same values outside autograd's graph: truncates back-propagation through time here.
  State detach() const;
};

}  // namespace rwkv
