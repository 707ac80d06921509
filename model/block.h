// The residual block that every version shares: x + TimeMix(LN(x)), then x + ChannelMix(LN(x)).
// LayerNorm, token shift and mixes are one op (model/ops/layer_norm_shift_mix.h); which mixes, and
// what TimeMix and ChannelMix compute is the version's own (model/rwkv4.h ...).
#pragma once

#include <memory>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/layers.h"
#include "model/recompute.h"
#include "model/state.h"

namespace rwkv {

struct TimeMixInput {
  std::vector<at::Tensor> mixed_J;  // the ln1 output mixed with its token shift, [B, T, C] each
  at::Tensor wkv;                   // wkv state before the first token
  at::Tensor v_first_BTC;           // the first layer's values; undefined in it
};
struct TimeMixOutput {
  at::Tensor y_BTC;  // to be added to the residual stream
  at::Tensor wkv;    // wkv state after the last token
  // The values that all later layers get, of the first layer; undefined in versions whose layers
  // have nothing of each other but the residual stream.
  at::Tensor v_first_BTC = {};
};
// What tells how a TimeMix fares; undefined where the version has none (model/telemetry.h).
struct TimeMixTelemetry {
  // Decay of the wkv state, each in [0, 1], fp32: [B, T, C], or [C] if it is that of every token.
  at::Tensor w_decay = {};
  at::Tensor iclr_BTC = {};  // in-context learning rate, each in [0, 1], fp32
};
// Base of the versions' TimeMix.
struct TimeMix : torch::nn::Module {
  // Shares of each token in its mixes with its predecessor, [J, C].
  virtual at::Tensor mixes() const = 0;
  virtual TimeMixOutput forward(const TimeMixInput& input) = 0;
  //   mixed_J  as TimeMixInput's
  virtual TimeMixTelemetry telemetry(const std::vector<at::Tensor>& /*mixed_J*/) const {
    return {};
  }
};

// Base of the versions' ChannelMix.
struct ChannelMix : torch::nn::Module {
  // As TimeMix's.
  virtual at::Tensor mixes() const = 0;
  //   residual_BTC  [B, T, C], what the output is added to
  //   mixed_J       the ln2 output mixed with its token shift, [B, T, C] each
  // Returns the sum.
  virtual at::Tensor forward(const at::Tensor& residual_BTC,
                             const std::vector<at::Tensor>& mixed_J) = 0;
};

struct BlockInput {
  at::Tensor x_BTC;
  at::Tensor v_first_BTC;  // as TimeMixInput's
};
struct BlockOutput {
  BlockInput next;  // of the next block
  LayerState after;
};

// Registered names: ln1, ln2, att, ffn, as in RWKV-LM's checkpoints; block 0 adds ln0, which
// normalises the embedding once before everything else.
struct BlockImpl : torch::nn::Module {
  BlockImpl(int64_t layer,
            int64_t n_embd,
            std::shared_ptr<TimeMix> time_mix,
            std::shared_ptr<ChannelMix> channel_mix);
  BlockOutput forward(const BlockInput& input, const LayerState& before, Recompute recompute);
  // Of what forward() would do.
  TimeMixTelemetry telemetry(const BlockInput& input, const LayerState& before);

  LayerNorm ln0 = nullptr;  // block 0 alone
  LayerNorm ln1;
  LayerNorm ln2;
  std::shared_ptr<TimeMix> att;
  std::shared_ptr<ChannelMix> ffn;

 private:
  BlockOutput run(const BlockInput& input, const LayerState& before, bool drop_mixes);
};
TORCH_MODULE(Block);

}  // namespace rwkv
