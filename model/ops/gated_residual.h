// gated_residual: x + sigmoid(r) * y, the end of a ChannelMix and of its block.
//
// Backward, with s = sigmoid(r): dx = dout (the same tensor), dy = dout s, dr = dout y s (1 - s).
// Source: RWKV paper, arXiv:2305.13048, section 3.1.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

//   x, r, y  one shape, one dtype (bf16, fp32 or fp64), one device
// Returns a tensor like x. Registered as rookery::gated_residual and differentiable; backward saves
// r and y. Arithmetic is fp32 (fp64 for fp64 inputs). Throws c10::Error naming what disagrees.
at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y);

}  // namespace rwkv::ops
