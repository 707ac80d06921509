#include "model/ops/adamw.h"

#include <optional>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "adamw_(Tensor(a!) master, Tensor(b!) m, Tensor(c!) v, Tensor grad, Tensor(d!)? "
      "weights, float lr, float beta1, float beta2, float eps, float weight_decay, float "
      "grad_scale, int step) -> ()");
  library.def("sum_of_squares(Tensor tensor) -> float");
}

}  // namespace

void adamw_(at::Tensor& master,
            at::Tensor& m,
            at::Tensor& v,
            const at::Tensor& grad,
            const at::Tensor& weights,
            const AdamwSettings& settings) {
  using Update = void(at::Tensor&,
                      at::Tensor&,
                      at::Tensor&,
                      const at::Tensor&,
                      const std::optional<at::Tensor>&,
                      double,
                      double,
                      double,
                      double,
                      double,
                      double,
                      int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rookery::adamw_", "").typed<Update>();
  for (const at::Tensor& tensor : {master, m, v, grad}) {
    TORCH_CHECK(tensor.dim() == 1 && tensor.numel() == master.numel() && tensor.is_contiguous() &&
                    tensor.scalar_type() == at::kFloat,
                "adamw_: a buffer is ",
                tensor.scalar_type(),
                " ",
                tensor.sizes(),
                ", expected contiguous float [",
                master.numel(),
                "]");
  }
  TORCH_CHECK(!weights.defined() || (weights.sizes() == master.sizes() && weights.is_contiguous() &&
                                     weights.scalar_type() == at::kBFloat16),
              "adamw_: weights is ",
              weights.toString(),
              " ",
              weights.sizes(),
              ", expected contiguous bfloat16 [",
              master.numel(),
              "]");
  op.call(master,
          m,
          v,
          grad,
          weights.defined() ? std::optional(weights) : std::nullopt,
          settings.lr,
          settings.beta1,
          settings.beta2,
          settings.eps,
          settings.weight_decay,
          settings.grad_scale,
          settings.step);
}

double sum_of_squares(const at::Tensor& tensor) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::sum_of_squares", "")
                             .typed<double(const at::Tensor&)>();
  TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(),
              "sum_of_squares: expected contiguous float, found ",
              tensor.scalar_type());
  return op.call(tensor);
}

}  // namespace rwkv::ops
