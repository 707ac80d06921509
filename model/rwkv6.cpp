#include "model/rwkv6.h"

#include <cmath>

#include <ATen/ATen.h>

#include "model/initial_values.h"
#include "model/ops/gated_residual.h"
#include "model/ops/relu_squared.h"
#include "model/ops/wkv6.h"

namespace rwkv {
namespace {

constexpr int64_t kNumMixes = 5;  // w, k, v, r, g

// ---- Initial values -----------------------------------------------------------------------------

// The vectors of a block by name; undefined for another.
at::Tensor initial_vector(const ModelConfig& config, int64_t layer, std::string_view name) {
  const double r01 = depth_up(config, layer), r10 = depth_down(config, layer);
  const at::Tensor d = channel_ratios(config.n_embd);
  if (name == "att.time_maa_x" || name == "att.time_maa_w" || name == "att.time_maa_k") {
    return 1 - d.pow(r10);
  }
  if (name == "att.time_maa_v") {
    return 1 - d.pow(r10) - 0.3 * r01;
  }
  if (name == "att.time_maa_r" || name == "att.time_maa_g") {
    return 1 - d.pow(0.5 * r10);
  }
  if (name.starts_with("ffn.time_maa_")) {
    return 1 - d.pow(std::pow(r10, 3));
  }
  if (name == "att.time_decay") {
    return initial_headed_decay(config, layer);
  }
  if (name == "att.time_faaaa") {
    return initial_headed_bonus(config, layer);
  }
  return {};
}

void initialise(const ModelConfig& config,
                std::string_view name,
                at::Tensor& parameter,
                double /*emb_range*/,
                at::Generator generator) {
  if (initialise_common(name, parameter, kHeadedEmbRange, generator)) {
    return;
  }
  const BlockName block = parse_block_name(name);
  if (const at::Tensor vector = initial_vector(config, block.layer, block.rest); vector.defined()) {
    parameter.copy_(vector.view_as(parameter));
  } else if (block.rest == "att.time_maa_w2" || block.rest == "att.time_decay_w2") {
    parameter.uniform_(-0.01, 0.01, generator);
  } else {
    initialise_headed(config, block, parameter, generator);
  }
}

}  // namespace

Rwkv6TimeMix::Rwkv6TimeMix(const ModelConfig& config)
    : receptance(config.dim_att, config.n_embd),
      key(config.dim_att, config.n_embd),
      value(config.dim_att, config.n_embd),
      gate(config.dim_att, config.n_embd),
      output(config.n_embd, config.dim_att),
      ln_x(config.dim_att),
      group_norm_eps_(config.group_norm_eps) {
  const int64_t C = config.n_embd, A = config.dim_att, N = config.head_size;
  const int64_t R = config.rank_mix, D = config.rank_decay;
  const std::pair<const char*, at::Tensor*> mixes[] = {{"time_maa_x", &time_maa_x},
                                                       {"time_maa_w", &time_maa_w},
                                                       {"time_maa_k", &time_maa_k},
                                                       {"time_maa_v", &time_maa_v},
                                                       {"time_maa_r", &time_maa_r},
                                                       {"time_maa_g", &time_maa_g}};
  for (const auto& [name, tensor] : mixes) {
    *tensor = register_parameter(name, at::empty({1, 1, C}));
  }
  time_maa_w1 = register_parameter("time_maa_w1", at::empty({C, kNumMixes * R}));
  time_maa_w2 = register_parameter("time_maa_w2", at::empty({kNumMixes, R, C}));
  time_decay = register_parameter("time_decay", at::empty({1, 1, A}));
  time_decay_w1 = register_parameter("time_decay_w1", at::empty({C, D}));
  time_decay_w2 = register_parameter("time_decay_w2", at::empty({D, A}));
  time_faaaa = register_parameter("time_faaaa", at::empty({A / N, N}));
  register_module("receptance", receptance);
  register_module("key", key);
  register_module("value", value);
  register_module("gate", gate);
  register_module("output", output);
  register_module("ln_x", ln_x);
}

at::Tensor Rwkv6TimeMix::mixes() const {
  const at::Tensor x_1C = time_maa_x.flatten(1);
  return at::cat({1 - x_1C, at::ones_like(x_1C), at::zeros_like(x_1C)});
}

std::vector<at::Tensor> Rwkv6TimeMix::mix(const std::vector<at::Tensor>& mixed_J) const {
  const at::Tensor& x_BTC = mixed_J[1];
  const int64_t B = x_BTC.size(0), T = x_BTC.size(1), C = x_BTC.size(2);
  const at::Tensor d_BTC = mixed_J[2] - x_BTC;
  const at::Tensor inner_5MR = low_rank_product(mixed_J[0], time_maa_w1)
                                   .tanh_()
                                   .view({B * T, kNumMixes, time_maa_w2.size(1)})
                                   .transpose(0, 1);
  const at::Tensor mixes_511C =
      at::cat({time_maa_w, time_maa_k, time_maa_v, time_maa_r, time_maa_g}).unsqueeze(1);
  const at::Tensor shares = at::bmm(inner_5MR, time_maa_w2).view({kNumMixes, B, T, C}) + mixes_511C;
  return (x_BTC + d_BTC * shares).unbind(0);
}

at::Tensor Rwkv6TimeMix::w_raw(const at::Tensor& X_w) const {
  return low_rank_product(low_rank_product(X_w, time_decay_w1).tanh_(), time_decay_w2);
}

TimeMixTelemetry Rwkv6TimeMix::telemetry(const std::vector<at::Tensor>& mixed_J) const {
  const at::Tensor w_raw_BTA = w_raw(mix(mixed_J).front()).to(time_decay.scalar_type());
  return {.w_decay = at::exp(-(time_decay + w_raw_BTA).exp())};
}

TimeMixOutput Rwkv6TimeMix::forward(const TimeMixInput& input) {
  const std::vector<at::Tensor> X = mix(input.mixed_J);
  const ops::Wkv6Output wkv = ops::wkv6({.r_BTC = receptance(X[3]),
                                         .w_raw_BTC = w_raw(X[0]),
                                         .k_BTC = key(X[1]),
                                         .v_BTC = value(X[2])},
                                        time_decay.flatten(),
                                        time_faaaa.flatten(),
                                        input.wkv);
  const at::Tensor y_MA = at::group_norm(
      wkv.y_BTC.flatten(0, 1), time_faaaa.size(0), ln_x->weight, ln_x->bias, group_norm_eps_);
  return {.y_BTC = output(y_MA.view_as(wkv.y_BTC) * at::silu(gate(X[4]))), .wkv = wkv.state_BHNN};
}

Rwkv6ChannelMix::Rwkv6ChannelMix(const ModelConfig& config)
    : time_maa_k(register_parameter("time_maa_k", at::empty({1, 1, config.n_embd}))),
      time_maa_r(register_parameter("time_maa_r", at::empty({1, 1, config.n_embd}))),
      key(config.dim_ffn, config.n_embd),
      receptance(config.n_embd, config.n_embd),
      value(config.n_embd, config.dim_ffn) {
  register_module("key", key);
  register_module("receptance", receptance);
  register_module("value", value);
}

at::Tensor Rwkv6ChannelMix::mixes() const {
  return 1 - at::cat({time_maa_k, time_maa_r}).flatten(1);
}

at::Tensor Rwkv6ChannelMix::forward(const at::Tensor& residual_BTC,
                                    const std::vector<at::Tensor>& mixed_J) {
  const at::Tensor k_BTF = ops::relu_squared_(key(mixed_J[0]));
  return ops::gated_residual(residual_BTC, receptance(mixed_J[1]), value(k_BTF));
}

ModelVersion rwkv6_version() {
  return {
      .name = "rwkv6",
      .make_time_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<TimeMix> {
        return std::make_shared<Rwkv6TimeMix>(config);
      },
      .make_channel_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<ChannelMix> {
        return std::make_shared<Rwkv6ChannelMix>(config);
      },
      .initial_wkv = &initial_head_states,
      .initialise = &initialise,
      .traits = &headed_traits};
}

}  // namespace rwkv
