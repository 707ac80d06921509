// cross_entropy: -log softmax(logits)[target] of each row, and the gradient of a sum of rows with
// RWKV's penalty on large logits.
//
//   loss_n = log sum_v e^{l_nv} - l_n,target
//   dl_nv = scale (softmax(l_n)_v - [v = target_n] + l2wrap max_n [v = argmax_n])
// max_n is the row's largest logit and argmax_n the first place that has it. L2Wrap pulls it
// towards zero and is not in the value. Source: BlinkDL/RWKV-LM RWKV-v4neo/src/model.py, class
// L2Wrap.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

// Arguments of both:
//   logits_NP   [N, P], bf16, fp32 or fp64, contiguous; N >= 1, P >= vocab_size. Columns from
//               vocab_size on are padding, whatever they hold.
//   targets_N   [N], int64, each in [0, vocab_size)
//   vocab_size  V >= 1
// Both return the losses in nats, [N], fp32 (fp64 for fp64 logits), and are registered under
// rookery:: by their names; neither has a gradient of its own: model/ops/head_loss.h is what a
// model is trained with. Arithmetic is fp32 (fp64). A row with a NaN has a loss of NaN. Throw
// c10::Error naming shapes and dtypes that do not fit, and on the CPU a target out of range
// (another device's targets are not read: that would wait for it).

at::Tensor cross_entropy(const at::Tensor& logits_NP,
                         const at::Tensor& targets_N,
                         int64_t vocab_size);

// Also writes dl, padding zero, OVER the logits: their memory exists once, and never in fp32 beside
// bf16. One pass computes the exponentials that losses and gradient share. l2wrap = 0 turns the
// penalty off.
at::Tensor cross_entropy_gradient_(const at::Tensor& logits_NP,
                                   const at::Tensor& targets_N,
                                   int64_t vocab_size,
                                   double l2wrap,
                                   double scale);

// The check of targets, for a caller that wants it before its work begins.
void check_targets(const at::Tensor& targets_N, int64_t vocab_size);

}  // namespace rwkv::ops
