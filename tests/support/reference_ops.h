// The maths of our ops written with plain Torch operations, to be read beside the paper and run in
// float64 with Torch's own autograd. Slow on purpose.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::test {

struct ReferenceWkv4 {
  at::Tensor y_BTA;
  at::Tensor numerator_BA;    // A after the last token, not scaled
  at::Tensor denominator_BA;  // B
};

// wkv4 as its definition says, with exponentials of any size: keep |k| small. numerator_BA and
// denominator_BA before the first token are given unscaled.
ReferenceWkv4 reference_wkv4(const at::Tensor& w_log_A,
                             const at::Tensor& k_BTA,
                             const at::Tensor& v_BTA,
                             const at::Tensor& u_A,
                             const at::Tensor& numerator_BA,
                             const at::Tensor& denominator_BA);

}  // namespace rwkv::test
