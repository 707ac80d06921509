// The residual block that every version shares: x + TimeMix(LN(x)), then x + ChannelMix(LN(x)).
// What TimeMix and ChannelMix compute is the version's own (model/rwkv4.h ...).
#pragma once

#include <memory>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/layers.h"
#include "model/state.h"

namespace rwkv {

struct TimeMixInput {
  at::Tensor x_BTC;   // the ln1 output
  LayerState before;  // state before the first token
};
struct TimeMixOutput {
  at::Tensor y_BTC;  // to be added to the residual stream
  at::Tensor wkv;    // wkv state after the last token
};
// Base of the versions' TimeMix.
struct TimeMix : torch::nn::Module {
  virtual TimeMixOutput forward(const TimeMixInput& input) = 0;
};

// Base of the versions' ChannelMix.
//   x_BTC         [B, T, C], the ln2 output
//   previous_BTC  [B, T, C], token_shift of x
struct ChannelMix : torch::nn::Module {
  virtual at::Tensor forward(const at::Tensor& x_BTC, const at::Tensor& previous_BTC) = 0;
};

struct BlockOutput {
  at::Tensor x_BTC;
  LayerState after;
};

// Registered names: ln1, ln2, att, ffn, as in RWKV-LM's checkpoints; block 0 adds ln0, which
// normalises the embedding once before everything else.
struct BlockImpl : torch::nn::Module {
  BlockImpl(int64_t layer,
            int64_t n_embd,
            std::shared_ptr<TimeMix> time_mix,
            std::shared_ptr<ChannelMix> channel_mix);
  BlockOutput forward(const at::Tensor& x_BTC, const LayerState& before);

  LayerNorm ln0 = nullptr;  // block 0 alone
  LayerNorm ln1;
  LayerNorm ln2;
  std::shared_ptr<TimeMix> att;
  std::shared_ptr<ChannelMix> ffn;
};
TORCH_MODULE(Block);

}  // namespace rwkv
