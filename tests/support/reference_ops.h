// The maths of our ops written with plain Torch operations, to be read beside the paper and run in
// float64 with Torch's own autograd. Slow on purpose.
#pragma once

#include <vector>

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

struct ReferenceWkv6 {
  at::Tensor y_BTC;
  at::Tensor state_BHNN;  // first the key, then the value
};

// wkv6 as its definition says, token by token; w_BTC is the decay itself.
ReferenceWkv6 reference_wkv6(const at::Tensor& r_BTC,
                             const at::Tensor& w_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& u_C,
                             const at::Tensor& state_BHNN);

struct ReferenceWkv7 {
  at::Tensor y_BTC;
  at::Tensor state_BHNN;  // as wkv7's: first the key, then the value
};

// wkv7 as its definition says, token by token; w_BTC is the decay itself.
ReferenceWkv7 reference_wkv7(const at::Tensor& r_BTC,
                             const at::Tensor& w_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& a_BTC,
                             const at::Tensor& b_BTC,
                             const at::Tensor& state_BHNN);

// layer_norm_shift_mix of s = x + delta: s, n of the last token, then each mix.
std::vector<at::Tensor> reference_layer_norm_shift_mix(const at::Tensor& s_BTC,
                                                       const at::Tensor& weight_C,
                                                       const at::Tensor& bias_C,
                                                       const at::Tensor& carry_BC,
                                                       const at::Tensor& mix_JC,
                                                       double eps);

// Cross entropy of each row. L2Wrap is in the gradient alone: half the square of the largest logit,
// less its own value.
at::Tensor reference_cross_entropy(const at::Tensor& logits_NV,
                                   const at::Tensor& targets_N,
                                   double l2wrap);

}  // namespace rwkv::test
