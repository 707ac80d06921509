// few_rows_linear: x W^T for a few rows of x, as in generation, where a product is nothing but
// reading W once.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

// With more rows the arithmetic, not the reading, takes the time, and a matrix product does it
// better.
inline constexpr int64_t kFewRows = 4;

//   x       [..., I], bf16 or fp32
//   weight  [O, I], dtype of x; it, or its transpose, contiguous, or it is copied
// Returns [..., O]. Registered as rookery::few_rows_linear; no gradient. Sums are fp32, in an order
// that depends on I and the layout alone. Its time is that of the bytes of W at the rate of reading
// memory, times the rows where W comes from the cache. Throws c10::Error naming shapes or dtypes
// that do not fit.
at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight_OI);

}  // namespace rwkv::ops
