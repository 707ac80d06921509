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

ReferenceWkv6 reference_wkv6(const at::Tensor& r_BTC,
                             const at::Tensor& w_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& u_C,
                             const at::Tensor& state_BHNN) {
  const int64_t B = r_BTC.size(0), H = state_BHNN.size(1), N = state_BHNN.size(2);
  at::Tensor S = state_BHNN;
  const at::Tensor u = u_C.view({1, H, N, 1});
  std::vector<at::Tensor> y;
  for (int64_t t = 0; t < r_BTC.size(1); ++t) {
    const auto column = [&](const at::Tensor& x) { return x.select(1, t).view({B, H, N, 1}); };
    const auto row = [&](const at::Tensor& x) { return x.select(1, t).view({B, H, 1, N}); };
    const at::Tensor kv = column(k_BTC) * row(v_BTC);
    y.push_back(row(r_BTC).matmul(S + u * kv).view({B, H * N}));
    S = column(w_BTC) * S + kv;
  }
  return {at::stack(y, 1), S};
}

ReferenceWkv7 reference_wkv7(const at::Tensor& r_BTC,
                             const at::Tensor& w_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& a_BTC,
                             const at::Tensor& b_BTC,
                             const at::Tensor& state_BHNN) {
  const int64_t B = r_BTC.size(0), H = state_BHNN.size(1), N = state_BHNN.size(2);
  // S as the paper has it: first the value, then the key.
  at::Tensor S = state_BHNN.transpose(2, 3);
  std::vector<at::Tensor> y;
  for (int64_t t = 0; t < r_BTC.size(1); ++t) {
    const auto column = [&](const at::Tensor& x) { return x.select(1, t).view({B, H, N, 1}); };
    const auto row = [&](const at::Tensor& x) { return x.select(1, t).view({B, H, 1, N}); };
    const at::Tensor u = S.matmul(column(a_BTC));
    S = S * row(w_BTC) + u * row(b_BTC) + column(v_BTC) * row(k_BTC);
    y.push_back(S.matmul(column(r_BTC)).view({B, H * N}));
  }
  return {at::stack(y, 1), S.transpose(2, 3)};
}

std::vector<at::Tensor> reference_layer_norm_shift_mix(const at::Tensor& s_BTC,
                                                       const at::Tensor& weight_C,
                                                       const at::Tensor& bias_C,
                                                       const at::Tensor& carry_BC,
                                                       const at::Tensor& mix_JC,
                                                       double eps) {
  const at::Tensor centred = s_BTC - s_BTC.mean({2}, true);
  const at::Tensor variance = centred.square().mean({2}, true);
  const at::Tensor n_BTC = centred / (variance + eps).sqrt() * weight_C + bias_C;
  const int64_t seq_len = s_BTC.size(1);
  const at::Tensor previous_BTC =
      at::cat({carry_BC.unsqueeze(1), n_BTC.slice(1, 0, seq_len - 1)}, 1);
  std::vector<at::Tensor> results{s_BTC * 1.0, n_BTC.select(1, seq_len - 1)};
  for (int64_t j = 0; j < mix_JC.size(0); ++j) {
    results.push_back(n_BTC * mix_JC[j] + previous_BTC * (1 - mix_JC[j]));
  }
  return results;
}

at::Tensor reference_cross_entropy(const at::Tensor& logits_NV,
                                   const at::Tensor& targets_N,
                                   double l2wrap) {
  const at::Tensor log_probs_NV = at::log_softmax(logits_NV, 1);
  const at::Tensor losses_N = -log_probs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1);
  const at::Tensor max_N = std::get<0>(logits_NV.max(1));
  const at::Tensor penalty_N = max_N.square() * (l2wrap / 2);
  return losses_N + penalty_N - penalty_N.detach();
}

}  // namespace rwkv::test
