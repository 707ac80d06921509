// Activations that are computed a second time in backward instead of being kept until then.
#pragma once

#include <array>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/recompute_mode.h"

namespace rwkv {

// Gives the memory of `dropped` back, whatever saved them for backward, and has it filled again as
// soon as backward comes to one of `outputs`, through which every gradient of their users must
// flow. `make_again` returns tensors like them, of the same bits. The tensors may not share memory
// with others, nor be read in between. Does nothing where no output needs a gradient.
void drop_until_backward(const std::vector<at::Tensor>& dropped,
                         const std::vector<at::Tensor>& outputs,
                         std::function<std::vector<at::Tensor>()> make_again);

// The values of function(inputs), of which only the inputs are kept: backward calls it again, and
// its own backward. Gradients of parameters that it uses arrive at them as from any other backward,
// hooks included. `function` must do the same both times. Five inputs, a block's and its state's;
// one may be undefined.
using Segment = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;
std::vector<at::Tensor> run_twice(Segment function, const std::array<at::Tensor, 5>& inputs);

}  // namespace rwkv
