#include "model/ops/embedding.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

struct EmbeddingFunction : torch::autograd::Function<EmbeddingFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& weight_VC,
                            const at::Tensor& tokens_BT) {
    const at::AutoDispatchBelowAutograd below;
    context->save_for_backward({tokens_BT});
    context->saved_data["vocab_size"] = weight_VC.size(0);
    return ops::embedding(weight_VC, tokens_BT);
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::embedding_backward", "")
                               .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>();
    const at::Tensor dweight_VC = op.call(grads[0].contiguous(),
                                          context->get_saved_variables()[0],
                                          context->saved_data["vocab_size"].toInt());
    return {dweight_VC, at::Tensor()};
  }
};

at::Tensor embedding_autograd(const at::Tensor& weight_VC, const at::Tensor& tokens_BT) {
  return EmbeddingFunction::apply(weight_VC, tokens_BT);
}

// Looking up is Torch's, on every device; it names a token that is out of range.
at::Tensor look_up(const at::Tensor& weight_VC, const at::Tensor& tokens_BT) {
  return at::embedding(weight_VC, tokens_BT);
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("embedding(Tensor weight, Tensor tokens) -> Tensor");
  library.def("embedding_backward(Tensor dy, Tensor tokens, int vocab_size) -> Tensor");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("embedding", &embedding_autograd);
}

TORCH_LIBRARY_IMPL(rookery, CompositeExplicitAutograd, library) {
  library.impl("embedding", &look_up);
}

}  // namespace

at::Tensor embedding(const at::Tensor& weight_VC, const at::Tensor& tokens_BT) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::embedding", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  TORCH_CHECK(
      weight_VC.dim() == 2, "embedding: weight_VC is ", weight_VC.sizes(), ", expected [V, C]");
  TORCH_CHECK(tokens_BT.scalar_type() == at::kLong,
              "embedding: tokens_BT is ",
              tokens_BT.scalar_type(),
              ", expected Long");
  return op.call(weight_VC, tokens_BT.contiguous());
}

}  // namespace rwkv::ops
