// relu_squared_: max(x, 0)^2 in place, between the two matrices of a ChannelMix.
//
// Backward, from the output h alone: dx = 2 sqrt(h) dh.
// Source: RWKV paper, arXiv:2305.13048, section 3.1; Primer, arXiv:2109.08668.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

//   x  any shape, contiguous, bf16, fp32 or fp64
// Overwrites x and returns it, so that nothing but the output is kept for backward, and backward
// writes dx OVER that output: the widest tensor of a block exists once. After backward the output
// is gone, and a second backward is wrong. x must not be a leaf that needs a gradient, nor a tensor
// that another op's backward reads (a matrix product does not read its output), and whatever reads
// the output in its backward must stand after this op. Registered as rookery::relu_squared_ and
// differentiable. A NaN stays one. Throws c10::Error for other dtypes.
at::Tensor relu_squared_(const at::Tensor& x);

}  // namespace rwkv::ops
