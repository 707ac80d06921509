#include "tests/support/reference_ops.h"

#include <ATen/ATen.h>

namespace rwkv::test {

ReferenceWkv4 reference_wkv4(const at::Tensor& w_log_A,
                             const at::Tensor& k_BTA,
                             const at::Tensor& v_BTA,
                             const at::Tensor& u_A,
                             const at::Tensor& numerator_BA,
                             const at::Tensor& denominator_BA) {
  at::Tensor numerator = numerator_BA;
  at::Tensor denominator = denominator_BA;
  const at::Tensor decay_A = w_log_A.exp();
  std::vector<at::Tensor> y;
  for (int64_t t = 0; t < k_BTA.size(1); ++t) {
    const at::Tensor k = k_BTA.select(1, t);
    const at::Tensor v = v_BTA.select(1, t);
    const at::Tensor bonus = (u_A + k).exp();
    y.push_back((numerator + bonus * v) / (denominator + bonus));
    numerator = decay_A * numerator + k.exp() * v;
    denominator = decay_A * denominator + k.exp();
  }
  return {at::stack(y, 1), numerator, denominator};
}

}  // namespace rwkv::test
