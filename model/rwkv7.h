// RWKV-7: TimeMix, ChannelMix, initial values, learning-rate and decay class of each parameter.
//
// Symbols: x the normalised input, x' its token shift, X_c = x + (x' - x) x_c per channel.
//   TimeMix:    r = Wr X_r, k = Wk X_k, v = Wv X_v
//               w_raw = w0 + tanh(X_w w1) w2        the decay
//               a_raw = a0 + (X_a a1) a2            the in-context learning rate, before its
//               sigmoid v_raw = v0 + (X_v v1) v2            the share of the first layer's values,
//               likewise g = sigmoid(X_g g1) g2 y = Wo (wkv7_output(wkv7(wkv7_inputs(k, a_raw, v,
//               v_raw), r, w_raw), g))
//   ChannelMix: y = Wv relu(Wk X_k)^2
// Source: RWKV-7 "Goose", arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/train_temp/src/model.py.
#pragma once

#include "model/block.h"
#include "model/version_registry.h"

namespace rwkv {

struct Rwkv7TimeMix : TimeMix {
  Rwkv7TimeMix(const ModelConfig& config, int64_t layer);
  // Rows r, w, k, v, a, g.
  at::Tensor mixes() const override;
  TimeMixOutput forward(const TimeMixInput& input) override;
  TimeMixTelemetry telemetry(const std::vector<at::Tensor>& mixed_J) const override;

  at::Tensor x_r, x_w, x_k, x_v, x_a, x_g;  // [1, 1, C]
  at::Tensor w0;                            // [1, 1, C], fp32
  at::Tensor w1, w2;                        // [C, D], [D, C], as the pairs below
  at::Tensor a0;                            // [1, 1, C]
  at::Tensor a1, a2;
  at::Tensor v0;  // these three of the first layer are used by nothing
  at::Tensor v1, v2;
  at::Tensor g1, g2;
  at::Tensor k_k, k_a;  // [1, 1, C]
  at::Tensor r_k;       // [H, N]
  Matrix receptance;    // [C, C], as the three below
  Matrix key;
  Matrix value;
  Matrix output;
  LayerNorm ln_x;  // of each head by itself

 private:
  at::Tensor w_raw(const at::Tensor& X_w) const;
  at::Tensor a_raw(const at::Tensor& X_a) const;

  bool is_first_;
  double group_norm_eps_;
};

struct Rwkv7ChannelMix : ChannelMix {
  explicit Rwkv7ChannelMix(const ModelConfig& config);
  // Row k.
  at::Tensor mixes() const override;
  at::Tensor forward(const at::Tensor& residual_BTC,
                     const std::vector<at::Tensor>& mixed_J) override;

  at::Tensor x_k;  // [1, 1, C]
  Matrix key;      // [F, C]
  Matrix value;    // [C, F]
};

// The registry's row.
ModelVersion rwkv7_version();

}  // namespace rwkv
