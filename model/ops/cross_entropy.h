// cross_entropy: -log softmax(logits)[target] of each row, with RWKV's penalty on large logits in
// its gradient.
//
//   loss_n = log sum_v e^{l_nv} - l_n,target
//   dl_nv = dloss_n (softmax(l_n)_v - [v = target_n] + l2wrap max_n [v = argmax_n])
// max_n is the row's largest logit and argmax_n the first place that has it. L2Wrap pulls it
// towards zero and is not in the value. Source: BlinkDL/RWKV-LM RWKV-v4neo/src/model.py, class
// L2Wrap.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

//   logits_NV  [N, V], bf16, fp32 or fp64, contiguous; N and V >= 1
//   targets_N  [N], int64, each in [0, V)
// Returns [N], fp32 (fp64 for fp64 logits). Registered as rookery::cross_entropy and differentiable
// in the logits. Backward writes the gradient OVER the logits, so that their memory exists once and
// never in fp32 beside bf16: after it the logits are gone, and a second backward is wrong.
// Arithmetic is fp32 (fp64). A row with a NaN has a loss of NaN. l2wrap = 0 turns the penalty off.
// Throws c10::Error naming shapes and dtypes that do not fit, and a target out of range.
at::Tensor cross_entropy(const at::Tensor& logits_NV, const at::Tensor& targets_N, double l2wrap);

}  // namespace rwkv::ops
