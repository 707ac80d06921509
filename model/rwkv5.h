// RWKV-5.2: TimeMix, ChannelMix, initial values, learning-rate and decay class of each parameter.
//
// Symbols: x the normalised input, x' its token shift, X_c = x time_mix_c + x' (1 - time_mix_c).
//   TimeMix:    r = Wr X_r, k = Wk X_k, v = Wv X_v, g = silu(Wg X_g)
//               y = Wo (GroupNorm(wkv6(r, time_decay, k, v, time_faaaa); ln_x, by head) g)
//   ChannelMix: RWKV-4's (model/rwkv4.h)
// Source: RWKV-5 and -6, "Eagle and Finch", arXiv:2404.05892; BlinkDL/RWKV-LM RWKV-v5/src/model.py.
#pragma once

#include "model/block.h"
#include "model/version_registry.h"

namespace rwkv {

struct Rwkv5TimeMix : TimeMix {
  explicit Rwkv5TimeMix(const ModelConfig& config);
  // Rows k, v, r, g.
  at::Tensor mixes() const override;
  TimeMixOutput forward(const TimeMixInput& input) override;
  TimeMixTelemetry telemetry(const std::vector<at::Tensor>& mixed_J) const override;

  at::Tensor time_mix_k, time_mix_v, time_mix_r, time_mix_g;  // [1, 1, C]
  at::Tensor time_decay, time_faaaa;                          // [H, N], fp32
  Matrix receptance;                                          // [A, C], as the three below
  Matrix key;
  Matrix value;
  Matrix gate;
  Matrix output;   // [C, A]
  LayerNorm ln_x;  // of each head by itself

 private:
  double group_norm_eps_;
};

// The registry's row.
ModelVersion rwkv5_version();

}  // namespace rwkv
