#include "model/ops/gated_residual.h"

#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

struct GatedResidualFunction : torch::autograd::Function<GatedResidualFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& r,
                            const at::Tensor& y) {
    const at::AutoDispatchBelowAutograd below;
    context->save_for_backward({r, y});
    return gated_residual(x, r, y);
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Backward =
        std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&, const at::Tensor&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::gated_residual_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    const at::Tensor dout = grads[0].contiguous();
    auto [dr, dy] = op.call(saved[0], saved[1], dout);
    return {dout, dr, dy};
  }
};

at::Tensor gated_residual_autograd(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y) {
  return GatedResidualFunction::apply(x, r, y);
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("gated_residual(Tensor x, Tensor r, Tensor y) -> Tensor");
  library.def("gated_residual_backward(Tensor r, Tensor y, Tensor dout) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("gated_residual", &gated_residual_autograd);
}

}  // namespace

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y) {
  using Forward = at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::gated_residual", "")
                             .typed<Forward>();
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "gated_residual: x is ",
              dtype,
              ", expected bfloat16, float or double");
  for (const at::Tensor& tensor : {r, y}) {
    TORCH_CHECK(tensor.sizes() == x.sizes() && tensor.scalar_type() == dtype,
                "gated_residual: r or y is ",
                tensor.scalar_type(),
                " ",
                tensor.sizes(),
                " but x is ",
                dtype,
                " ",
                x.sizes());
  }
  return op.call(x.contiguous(), r.contiguous(), y.contiguous());
}

}  // namespace rwkv::ops
