// layer_norm_shift_mix: what stands in front of every TimeMix and ChannelMix, in one pass: residual
// addition, LayerNorm, token shift and the mixes of each token with its predecessor.
//
//   s_t = x_t + delta_t                  n_t = (s_t - mean) / sqrt(var + eps) * weight + bias
//   mixed_j,t = n_t mu_j + n_{t-1} (1 - mu_j)       n_{-1} is the carried row
//
// Backward, with g_j the gradient of mixed_j, xhat_t = (s_t - mean) * rstd and averages over C:
//   gn_t = sum_j mu_j g_j,t + (1 - mu_j) g_j,t+1    (the last token's also gets that of `last`)
//   ds_t = ds_out_t + rstd (gn weight - avg(gn weight) - xhat avg(gn weight xhat))
//   dmu_j = sum_t g_j,t (n_t - n_{t-1})   dweight = sum_t gn_t xhat_t   dbias = sum_t gn_t
//   dcarry = sum_j (1 - mu_j) g_j,0
// Source: RWKV paper, arXiv:2305.13048, section 3.1; LayerNorm, arXiv:1607.06450.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct LayerNormShiftMixOutput {
  at::Tensor sum_BTC;               // s; x itself where there is no delta
  at::Tensor last_BC;               // n of the last token: the carry of what follows
  std::vector<at::Tensor> mixed_J;  // J tensors [B, T, C]
};

//   x_BTC      [B, T, C], bf16, fp32 or fp64; T >= 1
//   delta_BTC  as x, or undefined for none
//   weight_C, bias_C  [C], dtype of x
//   carry_BC   [B, C], dtype of x; zeros at the start of a text
//   mix_JC     [J, C], dtype of x; J >= 1
// All on one device. Registered as rookery::layer_norm_shift_mix and differentiable in everything.
// Arithmetic is fp32 (fp64 for fp64 inputs); s is rounded to x's dtype before it is normalised.
// Whoever goes on with the residual stream takes sum_BTC, so that its gradient joins ds in the same
// pass. Backward saves s and two numbers a token. Sums over tokens have a fixed order: two runs
// give the same bits, whatever the number of threads. Throws c10::Error naming the shapes and
// dtypes that disagree.
LayerNormShiftMixOutput layer_norm_shift_mix(const at::Tensor& x_BTC,
                                             const at::Tensor& delta_BTC,
                                             const at::Tensor& weight_C,
                                             const at::Tensor& bias_C,
                                             const at::Tensor& carry_BC,
                                             const at::Tensor& mix_JC,
                                             double eps);

}  // namespace rwkv::ops
