#include "model/ops/cpu_sums.h"

#include <ATen/ATen.h>

namespace rwkv::ops {
namespace {

template <typename Scalar>
void add_parts(const at::Tensor& parts_NX, at::Tensor& total) {
  const int64_t size = total.numel();
  const auto* part = parts_NX.const_data_ptr<Scalar>() + size;
  auto* sum = total.mutable_data_ptr<Scalar>();
  for (int64_t n = 1; n < parts_NX.size(0); ++n, part += size) {
    for (int64_t i = 0; i < size; ++i) {
      sum[i] += part[i];
    }
  }
}

}  // namespace

at::Tensor sum_in_order(const at::Tensor& parts_NX) {
  at::Tensor total = parts_NX[0].clone();
  if (parts_NX.scalar_type() == at::kDouble) {
    add_parts<double>(parts_NX, total);
  } else {
    add_parts<float>(parts_NX, total);
  }
  return total;
}

}  // namespace rwkv::ops
