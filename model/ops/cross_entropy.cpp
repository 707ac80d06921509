#include "model/ops/cross_entropy.h"

#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// losses [N], statistics [N, 2] (largest logit, log of the sum of e^{l - largest}), arg-max [N].
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResult call_forward(const at::Tensor& logits_NV, const at::Tensor& targets_N) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::cross_entropy_forward", "")
                             .typed<ForwardResult(const at::Tensor&, const at::Tensor&)>();
  return op.call(logits_NV, targets_N);
}

struct CrossEntropyFunction : torch::autograd::Function<CrossEntropyFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& logits_NV,
                            const at::Tensor& targets_N,
                            double l2wrap) {
    const at::AutoDispatchBelowAutograd below;
    auto [losses_N, statistics_N2, argmax_N] = call_forward(logits_NV, targets_N);
    context->save_for_backward({logits_NV, targets_N, statistics_N2, argmax_N});
    context->saved_data["l2wrap"] = l2wrap;
    return losses_N;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Backward = at::Tensor&(at::Tensor&,
                                 const at::Tensor&,
                                 const at::Tensor&,
                                 const at::Tensor&,
                                 const at::Tensor&,
                                 double);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::cross_entropy_backward_", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    at::Tensor logits_NV = saved[0].detach();
    op.call(logits_NV,
            saved[1],
            saved[2],
            saved[3],
            grads[0].contiguous(),
            context->saved_data["l2wrap"].toDouble());
    return {logits_NV, at::Tensor(), at::Tensor()};
  }
};

at::Tensor cross_entropy_autograd(const at::Tensor& logits_NV,
                                  const at::Tensor& targets_N,
                                  double l2wrap) {
  return CrossEntropyFunction::apply(logits_NV, targets_N, l2wrap);
}

at::Tensor cross_entropy_without_gradient(const at::Tensor& logits_NV,
                                          const at::Tensor& targets_N,
                                          double) {
  return std::get<0>(call_forward(logits_NV, targets_N));
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("cross_entropy(Tensor logits, Tensor targets, float l2wrap) -> Tensor");
  library.def("cross_entropy_forward(Tensor logits, Tensor targets) -> (Tensor, Tensor, Tensor)");
  library.def(
      "cross_entropy_backward_(Tensor(a!) logits, Tensor targets, Tensor statistics, Tensor "
      "argmax, Tensor dlosses, float l2wrap) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("cross_entropy", &cross_entropy_autograd);
}

// On every device: the kernels are those of cross_entropy_forward.
TORCH_LIBRARY_IMPL(rookery, CompositeExplicitAutograd, library) {
  library.impl("cross_entropy", &cross_entropy_without_gradient);
}

}  // namespace

at::Tensor cross_entropy(const at::Tensor& logits_NV, const at::Tensor& targets_N, double l2wrap) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::cross_entropy", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, double)>();
  TORCH_CHECK(logits_NV.dim() == 2 && logits_NV.size(0) >= 1 && logits_NV.size(1) >= 1,
              "cross_entropy: logits_NV is ",
              logits_NV.sizes(),
              ", expected [N, V] with N and V >= 1");
  const at::ScalarType dtype = logits_NV.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "cross_entropy: logits_NV is ",
              dtype,
              ", expected bfloat16, float or double");
  TORCH_CHECK(logits_NV.is_contiguous(), "cross_entropy: logits_NV is not contiguous");
  TORCH_CHECK(
      targets_N.sizes() == logits_NV.sizes().slice(0, 1) && targets_N.scalar_type() == at::kLong,
      "cross_entropy: targets_N is ",
      targets_N.scalar_type(),
      " ",
      targets_N.sizes(),
      ", expected Long [",
      logits_NV.size(0),
      "]");
  return op.call(logits_NV, targets_N.contiguous(), l2wrap);
}

}  // namespace rwkv::ops
