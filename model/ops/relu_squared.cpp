#include "model/ops/relu_squared.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

at::Tensor call_in_place(at::Tensor x) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::relu_squared_", "")
                             .typed<at::Tensor&(at::Tensor&)>();
  op.call(x);
  return x;
}

struct ReluSquaredFunction : torch::autograd::Function<ReluSquaredFunction> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x) {
    const at::AutoDispatchBelowAutograd below;
    call_in_place(x);
    context->mark_dirty({x});
    context->save_for_backward({x});
    return x;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::relu_squared_backward_", "")
                               .typed<at::Tensor&(at::Tensor&, const at::Tensor&)>();
    at::Tensor h = context->get_saved_variables()[0].detach();
    op.call(h, grads[0].contiguous());
    return {h};
  }
};

at::Tensor& relu_squared_autograd(at::Tensor& x) {
  ReluSquaredFunction::apply(x);
  return x;
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("relu_squared_(Tensor(a!) x) -> Tensor(a!)");
  library.def("relu_squared_backward_(Tensor(a!) h, Tensor dh) -> Tensor(a!)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("relu_squared_", &relu_squared_autograd);
}

}  // namespace

at::Tensor relu_squared_(const at::Tensor& x) {
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "relu_squared_: x is ",
              dtype,
              ", expected bfloat16, float or double");
  TORCH_CHECK(x.is_contiguous(), "relu_squared_: x of shape ", x.sizes(), " is not contiguous");
  return call_in_place(x);
}

}  // namespace rwkv::ops
