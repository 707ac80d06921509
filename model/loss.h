// The training loss: cross entropy, with RWKV's penalty on large logits in its gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv {

// Mean cross entropy in nats over all positions, fp32 (fp64 for fp64 logits), a scalar.
//   logits_BTV  [B, T, V], bf16, fp32 or fp64, contiguous; computed in fp32. Backward writes the
//               gradient over them.
//   targets_BT  [B, T], int64, each in [0, V)
// L2Wrap: the gradient of the logits also gets l2wrap / (B T) * max_logit at each position's
// arg-max entry, scaled by the gradient that comes in; it pulls the largest logit towards zero and
// is not in the value returned. l2wrap = 0 turns it off; RWKV-LM uses 1e-4.
// Source: BlinkDL/RWKV-LM RWKV-v4neo/src/model.py, class L2Wrap.
at::Tensor cross_entropy_loss(const at::Tensor& logits_BTV,
                              const at::Tensor& targets_BT,
                              double l2wrap);

// Cross entropy of each position, [B, T], fp32; no gradient.
at::Tensor token_losses(const at::Tensor& logits_BTV, const at::Tensor& targets_BT);

}  // namespace rwkv
