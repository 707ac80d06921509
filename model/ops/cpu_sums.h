// Sums over tensors' rows in an order that does not depend on threads or sizes, for gradients that
// several threads each have a part of.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

// parts_NX [N, ...], contiguous, fp32 or fp64, N >= 1: parts[0] + parts[1] + ..., one after
// another.
at::Tensor sum_in_order(const at::Tensor& parts_NX);

}  // namespace rwkv::ops
