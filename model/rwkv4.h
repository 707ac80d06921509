// RWKV-4: TimeMix, ChannelMix, initial values, learning-rate and decay class of each parameter.
//
// Symbols: x the normalised input, x' its token shift, lerp(mu) = x mu + x' (1 - mu) per channel.
//   TimeMix:    k = Wk lerp(mu_k), v = Wv lerp(mu_v), r = Wr lerp(mu_r)
//               y = Wo (sigmoid(r) * wkv4(k, v; w = -exp(time_decay), u = time_first))
//   ChannelMix: k = relu(Wk lerp(mu_k))^2, y = sigmoid(Wr lerp(mu_r)) * (Wv k)
// Source: RWKV paper, arXiv:2305.13048; BlinkDL/RWKV-LM RWKV-v4neo/src/model.py.
#pragma once

#include "model/block.h"
#include "model/version_registry.h"

namespace rwkv {

struct Rwkv4TimeMix : TimeMix {
  explicit Rwkv4TimeMix(const ModelConfig& config);
  // Rows k, v, r.
  at::Tensor mixes() const override;
  TimeMixOutput forward(const TimeMixInput& input) override;
  TimeMixTelemetry telemetry(const std::vector<at::Tensor>& mixed_J) const override;

  at::Tensor time_decay;  // [A], fp32
  at::Tensor time_first;  // [A], fp32
  at::Tensor time_mix_k;  // [1, 1, C], as the two below
  at::Tensor time_mix_v;
  at::Tensor time_mix_r;
  Matrix key;         // [A, C]
  Matrix value;       // [A, C]
  Matrix receptance;  // [A, C]
  Matrix output;      // [C, A]
};

struct Rwkv4ChannelMix : ChannelMix {
  explicit Rwkv4ChannelMix(const ModelConfig& config);
  // Rows k, r.
  at::Tensor mixes() const override;
  at::Tensor forward(const at::Tensor& residual_BTC,
                     const std::vector<at::Tensor>& mixed_J) override;

  at::Tensor time_mix_k;  // [1, 1, C]
  at::Tensor time_mix_r;
  Matrix key;         // [F, C]
  Matrix receptance;  // [C, C]
  Matrix value;       // [C, F]
};

// The registry's row.
ModelVersion rwkv4_version();

}  // namespace rwkv
