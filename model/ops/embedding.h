// embedding: rows of a table, and a gradient of the table that is summed in a fixed order.
//
//   y_n = weight[token_n]          dweight[v] = sum over n with token_n = v of dy_n
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

//   weight_VC  [V, C], bf16, fp32 or fp64, contiguous
//   tokens_BT  int64, each in [0, V)
// Returns [B, T, C]. Registered as rookery::embedding and differentiable in the weight. Backward
// adds the rows of one token in fp32 (fp64 for fp64), first to last, and rounds once: frequent
// tokens keep their precision in bf16, and two runs give the same bits, whatever the number of
// threads. Throws c10::Error naming a token that is out of range.
at::Tensor embedding(const at::Tensor& weight_VC, const at::Tensor& tokens_BT);

}  // namespace rwkv::ops
