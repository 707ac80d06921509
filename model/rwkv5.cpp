#include "model/rwkv5.h"

#include <cmath>

#include <ATen/ATen.h>

#include "model/initial_values.h"
#include "model/ops/gated_residual.h"
#include "model/ops/relu_squared.h"
#include "model/ops/wkv6.h"

namespace rwkv {
namespace {

at::Tensor initial_wkv(const ModelConfig& config,
                       int64_t batch_size,
                       const at::TensorOptions& options) {
  const int64_t N = config.head_size;
  return at::zeros({batch_size, config.dim_att / N, N, N}, options);
}

// ---- Initial values -----------------------------------------------------------------------------

constexpr double kEmbRange = 1e-4;

// The vectors of a block by name; undefined for another.
at::Tensor initial_vector(const ModelConfig& config, int64_t layer, std::string_view name) {
  const double r01 = depth_up(config, layer), r10 = depth_down(config, layer);
  const at::Tensor d = channel_ratios(config.n_embd), span = channel_span(config.dim_att);
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
    return -6 + 5 * span.pow(0.7 + 1.3 * r01);
  }
  if (name == "att.time_faaaa") {
    const at::Tensor zigzag = (at::arange(config.dim_att, at::kDouble) + 1).remainder(3) - 1;
    return r01 * (1 - span) + 0.1 * zigzag;
  }
  if (name == "att.ln_x.weight") {
    const double depth = static_cast<double>(layer + 1) / static_cast<double>(config.n_layer);
    return at::full({config.dim_att}, std::pow(depth, 0.7), at::kDouble);
  }
  return {};
}

void initialise(const ModelConfig& config,
                std::string_view name,
                at::Tensor& parameter,
                double /*emb_range*/,
                at::Generator generator) {
  if (name == "emb.weight") {
    parameter.uniform_(-kEmbRange, kEmbRange, generator);
    return;
  }
  if (name == "head.weight") {
    fill_orthogonal(parameter, 0.5 * widening_gain(parameter), generator);
    return;
  }
  if (name.ends_with(".bias")) {
    parameter.zero_();
    return;
  }
  if (name.starts_with("ln_out.")) {
    parameter.fill_(1);
    return;
  }
  const auto [layer, rest] = parse_block_name(name);
  if (const at::Tensor vector = initial_vector(config, layer, rest); vector.defined()) {
    parameter.copy_(vector.view_as(parameter));
  } else if (rest.starts_with("ln")) {
    parameter.fill_(1);
  } else if (rest == "att.receptance.weight" || rest == "att.value.weight" ||
             rest == "ffn.key.weight") {
    fill_orthogonal(parameter, 1, generator);
  } else if (rest == "att.key.weight" || rest == "att.gate.weight") {
    fill_orthogonal(parameter, 0.1, generator);
  } else {
    // output; ffn receptance, value.
    parameter.zero_();
  }
}

// ---- Training classes ---------------------------------------------------------------------------

ParameterTraits traits(std::string_view name, at::IntArrayRef shape) {
  ParameterTraits result;
  if (name.ends_with(".att.time_decay")) {
    result.lr_scale = 2;
    result.keep_fp32 = true;
  }
  if (name.ends_with(".att.time_faaaa")) {
    result.keep_fp32 = true;
  }
  result.weight_decay = num_wide_axes(shape) >= 2 && name.ends_with(".weight");
  return result;
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

Rwkv5ChannelMix::Rwkv5ChannelMix(const ModelConfig& config)
    : time_mix_k(register_parameter("time_mix_k", at::empty({1, 1, config.n_embd}))),
      time_mix_r(register_parameter("time_mix_r", at::empty({1, 1, config.n_embd}))),
      key(config.dim_ffn, config.n_embd),
      receptance(config.n_embd, config.n_embd),
      value(config.n_embd, config.dim_ffn) {
  register_module("key", key);
  register_module("receptance", receptance);
  register_module("value", value);
}

at::Tensor Rwkv5ChannelMix::mixes() const {
  return at::cat({time_mix_k, time_mix_r}).flatten(1);
}

at::Tensor Rwkv5ChannelMix::forward(const at::Tensor& residual_BTC,
                                    const std::vector<at::Tensor>& mixed_J) {
  const at::Tensor k_BTF = ops::relu_squared_(key(mixed_J[0]));
  return ops::gated_residual(residual_BTC, receptance(mixed_J[1]), value(k_BTF));
}

ModelVersion rwkv5_version() {
  return {
      .name = "rwkv5",
      .make_time_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<TimeMix> {
        return std::make_shared<Rwkv5TimeMix>(config);
      },
      .make_channel_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<ChannelMix> {
        return std::make_shared<Rwkv5ChannelMix>(config);
      },
      .initial_wkv = &initial_wkv,
      .initialise = &initialise,
      .traits = &traits};
}

}  // namespace rwkv
