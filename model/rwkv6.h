// RWKV-6: TimeMix, ChannelMix, initial values, learning-rate and decay class of each parameter.
//
// Symbols: x the normalised input, x' its token shift, d = x' - x.
//   TimeMix:    m = tanh((x + d time_maa_x) time_maa_w1), five groups w, k, v, r, g of rank_mix
//               X_c = x + d (time_maa_c + m_c time_maa_w2[c])
//               r = Wr X_r, k = Wk X_k, v = Wv X_v, g = silu(Wg X_g)
//               w_raw = time_decay + tanh(X_w time_decay_w1) time_decay_w2
//               y = Wo (GroupNorm(wkv6(r, w_raw, k, v, time_faaaa); ln_x, by head) g)
//   ChannelMix: y = sigmoid(Wr X_r) Wv relu(Wk X_k)^2       X_c = x + d time_maa_c
// Source: RWKV-5 and -6, "Eagle and Finch", arXiv:2404.05892; BlinkDL/RWKV-LM RWKV-v5/src/model.py.
#pragma once

#include "model/block.h"
#include "model/version_registry.h"

namespace rwkv {

struct Rwkv6TimeMix : TimeMix {
  explicit Rwkv6TimeMix(const ModelConfig& config);
  // Rows: x's mix, the token itself, its predecessor.
  at::Tensor mixes() const override;
  TimeMixOutput forward(const TimeMixInput& input) override;
  TimeMixTelemetry telemetry(const std::vector<at::Tensor>& mixed_J) const override;

  at::Tensor time_maa_x, time_maa_w, time_maa_k, time_maa_v, time_maa_r, time_maa_g;  // [1, 1, C]
  at::Tensor time_maa_w1, time_maa_w2;      // [C, 5 R], [5, R, C]
  at::Tensor time_decay;                    // [1, 1, A], fp32
  at::Tensor time_decay_w1, time_decay_w2;  // [C, D], [D, A]
  at::Tensor time_faaaa;                    // [H, N], fp32
  Matrix receptance;                        // [A, C], as the three below
  Matrix key;
  Matrix value;
  Matrix gate;
  Matrix output;   // [C, A]
  LayerNorm ln_x;  // of each head by itself

 private:
  // X_w, X_k, X_v, X_r, X_g, from what mixes() gives.
  std::vector<at::Tensor> mix(const std::vector<at::Tensor>& mixed_J) const;
  at::Tensor w_raw(const at::Tensor& X_w) const;

  double group_norm_eps_;
};

struct Rwkv6ChannelMix : ChannelMix {
  explicit Rwkv6ChannelMix(const ModelConfig& config);
  // Rows k, r.
  at::Tensor mixes() const override;
  at::Tensor forward(const at::Tensor& residual_BTC,
                     const std::vector<at::Tensor>& mixed_J) override;

  at::Tensor time_maa_k, time_maa_r;  // [1, 1, C]
  Matrix key;                         // [F, C]
  Matrix receptance;                  // [C, C]
  Matrix value;                       // [C, F]
};

// The registry's row.
ModelVersion rwkv6_version();

}  // namespace rwkv
