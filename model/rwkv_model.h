// A whole model of any version: embedding, blocks, ln_out, head.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/block.h"
#include "model/model_config.h"
#include "model/state.h"
#include "model/telemetry.h"
#include "model/version_registry.h"

namespace rwkv {

struct ModelOutput {
  at::Tensor logits_BTV;  // in the weights' dtype; the prediction for the token after each
  State state;            // after the last token
};

// Parameters carry RWKV-LM's checkpoint names (emb.weight, blocks.0.att.key.weight, ...). They are
// created in fp32 and uninitialised: call initialise(), or load weights (model/weights.h).
// GPT mode and RNN mode are one function: forward() over a whole sequence, or over one token after
// another with the state handed on, gives the same logits.
class RwkvModelImpl : public torch::nn::Module {
 public:
  // `config` may leave open what its version can fill in. Throws std::invalid_argument.
  explicit RwkvModelImpl(const ModelConfig& config);

  // The author's initial values; the same seed gives the same values. `emb_range` is the bound of
  // the embedding's uniform values, in RWKV-LM the initial learning rate.
  void initialise(uint64_t seed, double emb_range);

  //   tokens_BT  [B, T], int64, T >= 1, each in [0, vocab_size)
  //   state      of the same B; initial_state(B) at the start of a text
  // Throws c10::Error naming the range if an id is outside it.
  ModelOutput forward(const at::Tensor& tokens_BT, const State& state);
  // Only the last position's logits are computed: [B, V].
  struct LastOutput {
    at::Tensor logits_BV;
    State state;
  };
  LastOutput forward_last(const at::Tensor& tokens_BT, const State& state);

  // What training minimises: the mean cross entropy in nats of the token after each, with L2Wrap in
  // its gradient alone (model/ops/head_loss.h). There are never logits of all positions beside the
  // activations that wait for backward.
  //   targets_BT  as tokens_BT
  struct LossOutput {
    at::Tensor loss;  // a scalar, fp32 (fp64 for an fp64 model)
    State state;
  };
  LossOutput loss(const at::Tensor& tokens_BT,
                  const at::Tensor& targets_BT,
                  const State& state,
                  double l2wrap);

  // A forward pass without gradient, to look at what it computes; of logits there are never more
  // than head_loss makes at once. Costs that pass, and each layer's norm, mixes and low-rank
  // products a second time.
  ModelTelemetry telemetry(const at::Tensor& tokens_BT, const State& state);

  // What a sequence starts from: nothing read yet, or what set_initial_state() said.
  State initial_state(int64_t batch_size) const;
  // Every sequence starts from `row`, a state of one batch row, from now on: constant, not trained.
  void set_initial_state(const State& row);

  // Makes the weights bf16 (at::kBFloat16), fp32 or fp64; those whose traits say so stay fp32 in a
  // bf16 model.
  void set_dtype(at::ScalarType dtype);
  at::ScalarType dtype() const;
  at::Device device() const;

  // What backward computes a second time; kNone at first.
  void set_recompute(Recompute recompute) { recompute_ = recompute; }

  const ModelConfig& config() const { return config_; }
  const ModelVersion& version() const { return *version_; }
  ParameterTraits traits(const std::string& name, at::IntArrayRef shape) const {
    return version_->traits(name, shape);
  }
  int64_t num_parameters() const;

 private:
  struct Hidden {
    at::Tensor x_BTC;  // ln_out not yet applied
    State state;
  };
  // `visit`, if given, is called after each block.
  Hidden run_blocks(
      const at::Tensor& tokens_BT,
      const State& state,
      const std::function<void(size_t layer, const BlockInput& input, const LayerState& after)>&
          visit = nullptr);

  ModelConfig config_;
  const ModelVersion* version_;
  Recompute recompute_ = Recompute::kNone;
  State initial_row_;  // no layers: nothing read yet
  Matrix emb_;
  std::vector<Block> blocks_;
  LayerNorm ln_out_;
  Matrix head_;
};
TORCH_MODULE(RwkvModel);

}  // namespace rwkv
