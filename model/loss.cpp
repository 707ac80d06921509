#include "model/loss.h"

#include <ATen/ATen.h>

#include "model/ops/cross_entropy.h"

namespace rwkv {

at::Tensor cross_entropy_loss(const at::Tensor& logits_BTV,
                              const at::Tensor& targets_BT,
                              double l2wrap) {
  return ops::cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), l2wrap).mean();
}

at::Tensor token_losses(const at::Tensor& logits_BTV, const at::Tensor& targets_BT) {
  const at::NoGradGuard no_grad;
  return ops::cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), 0).view_as(targets_BT);
}

}  // namespace rwkv
