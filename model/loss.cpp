#include "model/loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

namespace rwkv {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

at::Tensor in_fp32(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
}

// Forward and gradient in one function: backward starts from the log-probabilities of forward, and
// L2Wrap joins the gradient in the same pass over the logits.
struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& logits_NV,
                            const at::Tensor& targets_N,
                            double l2wrap) {
    const at::Tensor log_probs_NV = at::log_softmax(in_fp32(logits_NV), 1);
    context->save_for_backward({logits_NV, targets_N, log_probs_NV});
    context->saved_data["l2wrap"] = l2wrap;
    return at::nll_loss(log_probs_NV, targets_N);
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    const auto saved = context->get_saved_variables();
    const at::Tensor& logits_NV = saved[0];
    const at::Tensor targets_N1 = saved[1].unsqueeze(1);
    const double l2wrap = context->saved_data["l2wrap"].toDouble();
    const double scale = 1.0 / static_cast<double>(logits_NV.size(0));
    at::Tensor dlogits_NV = saved[2].exp();
    dlogits_NV.scatter_add_(
        1, targets_N1, at::full({}, -1.0, dlogits_NV.options()).expand_as(targets_N1));
    if (l2wrap != 0) {
      const auto [max_N1, argmax_N1] = logits_NV.max(1, true);
      dlogits_NV.scatter_add_(1, argmax_N1, max_N1.to(dlogits_NV.scalar_type()) * l2wrap);
    }
    dlogits_NV.mul_(grads[0] * scale);
    return {dlogits_NV.to(logits_NV.scalar_type()), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor cross_entropy_loss(const at::Tensor& logits_BTV,
                              const at::Tensor& targets_BT,
                              double l2wrap) {
  return CrossEntropyFunction::apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), l2wrap);
}

at::Tensor token_losses(const at::Tensor& logits_BTV, const at::Tensor& targets_BT) {
  const at::NoGradGuard no_grad;
  const at::Tensor log_probs_NV = at::log_softmax(in_fp32(logits_BTV.flatten(0, 1)), 1);
  return -log_probs_NV.gather(1, targets_BT.flatten().unsqueeze(1)).view_as(targets_BT);
}

}  // namespace rwkv
