#include "model/rwkv_model.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "model/ops/arguments.h"
#include "model/ops/embedding.h"
#include "model/ops/head_chunks.h"
#include "model/ops/head_loss.h"
#include "model/version_shapes.h"

namespace rwkv {
namespace {

ModelConfig resolved(ModelConfig config) {
  find_version_shapes(config.version).resolve(config);
  config.validate();
  return config;
}

}  // namespace

RwkvModelImpl::RwkvModelImpl(const ModelConfig& config)
    : config_(resolved(config)),
      version_(&find_version(config_.version)),
      emb_(config_.vocab_size, config_.n_embd),
      ln_out_(config_.n_embd),
      head_(config_.vocab_size, config_.n_embd) {
  register_module("emb", emb_);
  // A list whose children are called 0, 1, ...: blocks.0.ln1.weight and so on.
  const auto blocks = register_module("blocks", std::make_shared<torch::nn::Module>());
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
    Block block(layer,
                config_.n_embd,
                version_->make_time_mix(config_, layer),
                version_->make_channel_mix(config_, layer));
    blocks->register_module(std::to_string(layer), block);
    blocks_.push_back(block);
  }
  register_module("ln_out", ln_out_);
  register_module("head", head_);
}

void RwkvModelImpl::initialise(uint64_t seed, double emb_range) {
  const at::NoGradGuard no_grad;
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  for (auto& item : named_parameters()) {
    version_->initialise(config_, item.key(), item.value(), emb_range, generator);
  }
}

RwkvModelImpl::Hidden RwkvModelImpl::run_blocks(
    const at::Tensor& tokens_BT,
    const State& state,
    const std::function<void(size_t layer, const BlockInput& input, const LayerState& after)>&
        visit) {
  TORCH_CHECK(tokens_BT.dim() == 2 && tokens_BT.size(1) >= 1,
              "tokens_BT is ",
              tokens_BT.sizes(),
              ", expected [B, T] with T >= 1");
  TORCH_CHECK(static_cast<int64_t>(state.layers.size()) == config_.n_layer,
              "state has ",
              state.layers.size(),
              " layers but the model has ",
              config_.n_layer);
  Hidden hidden;
  BlockInput input{.x_BTC = ops::embedding(emb_->weight, tokens_BT), .v_first_BTC = {}};
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    BlockOutput output = blocks_[layer](input, state.layers[layer], recompute_);
    if (visit) {
      visit(layer, input, output.after);
    }
    input = std::move(output.next);
    hidden.state.layers.push_back(std::move(output.after));
  }
  hidden.x_BTC = std::move(input.x_BTC);
  return hidden;
}

ModelOutput RwkvModelImpl::forward(const at::Tensor& tokens_BT, const State& state) {
  Hidden hidden = run_blocks(tokens_BT, state);
  return {.logits_BTV = head_(ln_out_(hidden.x_BTC)), .state = std::move(hidden.state)};
}

RwkvModelImpl::LastOutput RwkvModelImpl::forward_last(const at::Tensor& tokens_BT,
                                                      const State& state) {
  Hidden hidden = run_blocks(tokens_BT, state);
  const at::Tensor last_BC = hidden.x_BTC.select(1, tokens_BT.size(1) - 1);
  return {.logits_BV = head_(ln_out_(last_BC)), .state = std::move(hidden.state)};
}

RwkvModelImpl::LossOutput RwkvModelImpl::loss(const at::Tensor& tokens_BT,
                                              const at::Tensor& targets_BT,
                                              const State& state,
                                              double l2wrap) {
  TORCH_CHECK(targets_BT.sizes() == tokens_BT.sizes(),
              "targets_BT is ",
              targets_BT.sizes(),
              " but tokens_BT is ",
              tokens_BT.sizes());
  Hidden hidden = run_blocks(tokens_BT, state);
  const at::Tensor hidden_NC = ln_out_(hidden.x_BTC).flatten(0, 1);
  return {
      .loss = ops::head_loss(hidden_NC, head_->weight, targets_BT.flatten(), {.l2wrap = l2wrap}),
      .state = std::move(hidden.state)};
}

ModelTelemetry RwkvModelImpl::telemetry(const at::Tensor& tokens_BT, const State& state) {
  const at::NoGradGuard no_grad;
  std::map<std::string, std::vector<at::Tensor>> by_layer;
  const Hidden hidden = run_blocks(
      tokens_BT, state, [&](size_t layer, const BlockInput& input, const LayerState& after) {
        const auto told =
            summarise(blocks_[layer]->telemetry(input, state.layers[layer]), after.wkv);
        for (const auto& [name, value_H] : told) {
          by_layer[name].push_back(value_H);
        }
      });
  ModelTelemetry result;
  for (const auto& [name, values] : by_layer) {
    result.by_layer[name] = at::stack(values);
  }
  const at::Tensor hidden_NC = ln_out_(hidden.x_BTC).flatten(0, 1);
  const int64_t rows = hidden_NC.size(0);
  const int64_t chunk = ops::choose_rows_per_chunk(
      rows, config_.vocab_size * static_cast<int64_t>(hidden_NC.element_size()));
  std::vector<at::Tensor> largest;
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    largest.push_back(head_(hidden_NC.slice(0, begin, begin + chunk)).max());
  }
  result.largest_logit = at::stack(largest).max();
  return result;
}

State RwkvModelImpl::initial_state(int64_t batch_size) const {
  const at::TensorOptions activations = emb_->weight.options().requires_grad(false);
  const at::TensorOptions exact = activations.dtype(ops::exact_type(dtype()));
  State state;
  for (const LayerState& row : initial_row_.layers) {
    state.layers.push_back(
        {.att_shift_BC = row.att_shift_BC.to(activations).repeat({batch_size, 1}),
         .ffn_shift_BC = row.ffn_shift_BC.to(activations).repeat({batch_size, 1}),
         .wkv = at::cat(std::vector(static_cast<size_t>(batch_size), row.wkv.to(exact)))});
  }
  if (!state.layers.empty()) {
    return state;
  }
  for (int64_t layer = 0; layer < config_.n_layer; ++layer) {
    state.layers.push_back({.att_shift_BC = at::zeros({batch_size, config_.n_embd}, activations),
                            .ffn_shift_BC = at::zeros({batch_size, config_.n_embd}, activations),
                            .wkv = version_->initial_wkv(config_, batch_size, exact)});
  }
  return state;
}

void RwkvModelImpl::set_initial_state(const State& row) {
  TORCH_CHECK(static_cast<int64_t>(row.layers.size()) == config_.n_layer,
              "the state has ",
              row.layers.size(),
              " layers but the model has ",
              config_.n_layer);
  initial_row_ = row.detach();
}

void RwkvModelImpl::set_dtype(at::ScalarType dtype) {
  for (auto& item : named_parameters()) {
    at::Tensor& parameter = item.value();
    const bool exact = dtype == at::kBFloat16 && traits(item.key(), parameter.sizes()).keep_fp32;
    parameter.set_data(parameter.data().to(exact ? at::kFloat : dtype));
  }
}

at::ScalarType RwkvModelImpl::dtype() const {
  return emb_->weight.scalar_type();
}

at::Device RwkvModelImpl::device() const {
  return emb_->weight.device();
}

int64_t RwkvModelImpl::num_parameters() const {
  int64_t count = 0;
  for (const at::Tensor& parameter : parameters()) {
    count += parameter.numel();
  }
  return count;
}

}  // namespace rwkv
