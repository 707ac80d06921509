#include "model/rwkv5.h"

#include <ATen/ATen.h>

#include "model/initial_values.h"
#include "model/ops/wkv6.h"
#include "model/rwkv4.h"

namespace rwkv {
namespace {

// ---- Initial values -----------------------------------------------------------------------------

// The vectors of a block by name; undefined for another.
at::Tensor initial_vector(const ModelConfig& config, int64_t layer, std::string_view name) {
  const double r01 = depth_up(config, layer), r10 = depth_down(config, layer);
  const at::Tensor d = channel_ratios(config.n_embd);
  if (name == "att.time_mix_v") {
    return d.pow(r10) + 0.3 * r01;
  }
  if (name == "att.time_mix_r" || name == "att.time_mix_g") {
    return d.pow(0.5 * r10);
  }
  if (name == "att.time_mix_k" || name.starts_with("ffn.time_mix_")) {
    return d.pow(r10);
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
  } else {
    initialise_headed(config, block, parameter, generator);
  }
}

}  // namespace

Rwkv5TimeMix::Rwkv5TimeMix(const ModelConfig& config)
    : receptance(config.dim_att, config.n_embd),
      key(config.dim_att, config.n_embd),
      value(config.dim_att, config.n_embd),
      gate(config.dim_att, config.n_embd),
      output(config.n_embd, config.dim_att),
      ln_x(config.dim_att),
      group_norm_eps_(config.group_norm_eps) {
  const int64_t C = config.n_embd, N = config.head_size, H = config.dim_att / N;
  time_mix_k = register_parameter("time_mix_k", at::empty({1, 1, C}));
  time_mix_v = register_parameter("time_mix_v", at::empty({1, 1, C}));
  time_mix_r = register_parameter("time_mix_r", at::empty({1, 1, C}));
  time_mix_g = register_parameter("time_mix_g", at::empty({1, 1, C}));
  time_decay = register_parameter("time_decay", at::empty({H, N}));
  time_faaaa = register_parameter("time_faaaa", at::empty({H, N}));
  register_module("receptance", receptance);
  register_module("key", key);
  register_module("value", value);
  register_module("gate", gate);
  register_module("output", output);
  register_module("ln_x", ln_x);
}

at::Tensor Rwkv5TimeMix::mixes() const {
  return at::cat({time_mix_k, time_mix_v, time_mix_r, time_mix_g}).flatten(1);
}

TimeMixTelemetry Rwkv5TimeMix::telemetry(const std::vector<at::Tensor>& /*mixed_J*/) const {
  return {.w_decay = at::exp(-time_decay.exp()).flatten()};
}

TimeMixOutput Rwkv5TimeMix::forward(const TimeMixInput& input) {
  const ops::Wkv6Output wkv = ops::wkv6({.r_BTC = receptance(input.mixed_J[2]),
                                         .w_raw_BTC = {},
                                         .k_BTC = key(input.mixed_J[0]),
                                         .v_BTC = value(input.mixed_J[1])},
                                        time_decay.flatten(),
                                        time_faaaa.flatten(),
                                        input.wkv);
  const at::Tensor y_MA = at::group_norm(
      wkv.y_BTC.flatten(0, 1), time_faaaa.size(0), ln_x->weight, ln_x->bias, group_norm_eps_);
  return {.y_BTC = output(y_MA.view_as(wkv.y_BTC) * at::silu(gate(input.mixed_J[3]))),
          .wkv = wkv.state_BHNN};
}

ModelVersion rwkv5_version() {
  return {
      .name = "rwkv5",
      .make_time_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<TimeMix> {
        return std::make_shared<Rwkv5TimeMix>(config);
      },
      .make_channel_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<ChannelMix> {
        return std::make_shared<Rwkv4ChannelMix>(config);
      },
      .initial_wkv = &initial_head_states,
      .initialise = &initialise,
      .traits = &headed_traits};
}

}  // namespace rwkv
