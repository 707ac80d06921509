#include "model/ops/few_rows_linear.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("few_rows_linear(Tensor x, Tensor weight) -> Tensor");
}

}  // namespace

at::Tensor few_rows_linear(const at::Tensor& x, const at::Tensor& weight_OI) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::few_rows_linear", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kFloat,
              "few_rows_linear: x is ",
              x.scalar_type(),
              ", expected bfloat16 or float");
  TORCH_CHECK(x.dim() >= 1 && weight_OI.dim() == 2 && x.size(-1) == weight_OI.size(1) &&
                  x.scalar_type() == weight_OI.scalar_type(),
              "few_rows_linear: x is ",
              x.scalar_type(),
              " ",
              x.sizes(),
              " but weight_OI is ",
              weight_OI.scalar_type(),
              " ",
              weight_OI.sizes());
  return op.call(x.contiguous(),
                 weight_OI.t().is_contiguous() ? weight_OI : weight_OI.contiguous());
}

}  // namespace rwkv::ops
