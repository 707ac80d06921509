// head_loss: the head's matrix product, the cross entropy of its logits and RWKV's penalty on large
// ones, as one op.
//
//   l = x W^T                      loss = 1/N sum_n cross_entropy(l_n, target_n)
//   dx = dl W                      dW = dl^T x
// with dl of model/ops/cross_entropy.h, L2Wrap included. A loss is a scalar, so its gradient is
// known but for a factor: forward computes dx and dW while a chunk of rows has its logits, writes
// the gradient over them, and backward multiplies by the gradient that comes in. So no logits wait
// for backward, and [N, V] does not exist at once where there are several chunks.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct HeadLossSettings {
  double l2wrap = 0;  // >= 0; 0 turns the penalty off. RWKV-LM uses 1e-4.
  // Rows of logits at once, >= 1. Left out, the op chooses: those that fit into 512 MiB, in chunks
  // of equal size.
  std::optional<int64_t> rows_per_chunk = {};
  // >= 1. The products are those of a vocabulary padded with zero rows to a multiple of this;
  // values and gradients do not see the padding. Left out, it is 64 on CUDA, where a product with
  // an odd number of columns takes seven times as long, and 1 on the CPU, which does not mind.
  std::optional<int64_t> vocab_multiple = {};
};

//   hidden_NC  [N, C], bf16, fp32 or fp64; N >= 1
//   weight_VC  [V, C], dtype of hidden
//   targets_N  [N], int64, each in [0, V)
// Returns the mean loss in nats, a scalar, fp32 (fp64 for fp64). Registered as rookery::head_loss
// and differentiable in hidden and weight; of the two gradients only what is needed is computed,
// and without either forward computes losses alone. Between forward and backward it keeps dx and
// dW, [N, C] and [V, C], and nothing else. Over several chunks dW is summed in fp32 where the
// weight is bf16. Two runs on as many threads give the same bits. Backward scales the two in place:
// a second one through the same graph throws. Throws c10::Error naming shapes, dtypes and settings
// that do not fit and, on the CPU, a target out of range.
at::Tensor head_loss(const at::Tensor& hidden_NC,
                     const at::Tensor& weight_VC,
                     const at::Tensor& targets_N,
                     const HeadLossSettings& settings);

}  // namespace rwkv::ops
