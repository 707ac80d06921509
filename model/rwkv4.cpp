#include "model/rwkv4.h"

#include <cmath>

#include <ATen/ATen.h>

#include "model/initial_values.h"
#include "model/ops/gated_residual.h"
#include "model/ops/relu_squared.h"
#include "model/ops/wkv4.h"

namespace rwkv {
namespace {

// Parameters [1, 1, C] as rows.
at::Tensor rows_of(at::TensorList mixes) {
  return at::cat(mixes).flatten(1);
}

at::Tensor initial_wkv(const ModelConfig& config,
                       int64_t batch_size,
                       const at::TensorOptions& options) {
  return ops::wkv4_initial_state(batch_size, config.dim_att, options);
}

// ---- Initial values -----------------------------------------------------------------------------

at::Tensor initial_time_decay(const ModelConfig& config, double r01) {
  return -5 + 8 * channel_span(config.dim_att).pow(0.7 + 1.3 * r01);
}

at::Tensor initial_time_first(const ModelConfig& config) {
  const at::Tensor zigzag = (at::arange(config.dim_att, at::kDouble) + 1).remainder(3) - 1;
  return std::log(0.3) + 0.5 * zigzag;
}

void initialise(const ModelConfig& config,
                std::string_view name,
                at::Tensor& parameter,
                double emb_range,
                at::Generator generator) {
  if (initialise_common(name, parameter, emb_range, generator)) {
    return;
  }
  const auto [layer, rest] = parse_block_name(name);
  const double r01 = depth_up(config, layer);
  const double r10 = depth_down(config, layer);
  const at::Tensor d = channel_ratios(config.n_embd);
  if (rest.starts_with("ln")) {
    parameter.fill_(1);
  } else if (rest == "att.time_decay") {
    parameter.copy_(initial_time_decay(config, r01));
  } else if (rest == "att.time_first") {
    parameter.copy_(initial_time_first(config));
  } else if (rest == "att.time_mix_v") {
    parameter.copy_((d.pow(r10) + 0.3 * r01).view_as(parameter));
  } else if (rest == "att.time_mix_r") {
    parameter.copy_(d.pow(0.5 * r10).view_as(parameter));
  } else if (rest == "att.time_mix_k" || rest.starts_with("ffn.time_mix_")) {
    parameter.copy_(d.pow(r10).view_as(parameter));
  } else if (rest == "att.value.weight" || rest == "ffn.key.weight") {
    fill_orthogonal(parameter, widening_gain(parameter), generator);
  } else {
    // att key, receptance, output; ffn receptance, value.
    parameter.zero_();
  }
}

// ---- Training classes ---------------------------------------------------------------------------

ParameterTraits traits(std::string_view name, at::IntArrayRef shape) {
  ParameterTraits result;
  if (name.ends_with(".att.time_decay")) {
    result.lr_scale = 2;
    result.keep_fp32 = true;
  } else if (name.ends_with(".att.time_first")) {
    result.lr_scale = 3;
    result.keep_fp32 = true;
  }
  result.weight_decay = num_wide_axes(shape) >= 2;
  return result;
}

}  // namespace

Rwkv4TimeMix::Rwkv4TimeMix(const ModelConfig& config)
    : time_decay(register_parameter("time_decay", at::empty({config.dim_att}))),
      time_first(register_parameter("time_first", at::empty({config.dim_att}))),
      time_mix_k(register_parameter("time_mix_k", at::empty({1, 1, config.n_embd}))),
      time_mix_v(register_parameter("time_mix_v", at::empty({1, 1, config.n_embd}))),
      time_mix_r(register_parameter("time_mix_r", at::empty({1, 1, config.n_embd}))),
      key(config.dim_att, config.n_embd),
      value(config.dim_att, config.n_embd),
      receptance(config.dim_att, config.n_embd),
      output(config.n_embd, config.dim_att) {
  register_module("key", key);
  register_module("value", value);
  register_module("receptance", receptance);
  register_module("output", output);
}

at::Tensor Rwkv4TimeMix::mixes() const {
  return rows_of({time_mix_k, time_mix_v, time_mix_r});
}

TimeMixTelemetry Rwkv4TimeMix::telemetry(const std::vector<at::Tensor>& /*mixed_J*/) const {
  return {.w_decay = at::exp(-time_decay.exp())};
}

TimeMixOutput Rwkv4TimeMix::forward(const TimeMixInput& input) {
  const at::Tensor k_BTA = key(input.mixed_J[0]);
  const at::Tensor v_BTA = value(input.mixed_J[1]);
  const at::Tensor r_BTA = receptance(input.mixed_J[2]);
  const at::Tensor w_log_A = -time_decay.exp();
  const ops::Wkv4Output gated = ops::wkv4(w_log_A, k_BTA, v_BTA, time_first, input.wkv, r_BTA);
  return {.y_BTC = output(gated.y_BTA), .wkv = gated.state_B3A};
}

Rwkv4ChannelMix::Rwkv4ChannelMix(const ModelConfig& config)
    : time_mix_k(register_parameter("time_mix_k", at::empty({1, 1, config.n_embd}))),
      time_mix_r(register_parameter("time_mix_r", at::empty({1, 1, config.n_embd}))),
      key(config.dim_ffn, config.n_embd),
      receptance(config.n_embd, config.n_embd),
      value(config.n_embd, config.dim_ffn) {
  register_module("key", key);
  register_module("receptance", receptance);
  register_module("value", value);
}

at::Tensor Rwkv4ChannelMix::mixes() const {
  return rows_of({time_mix_k, time_mix_r});
}

at::Tensor Rwkv4ChannelMix::forward(const at::Tensor& residual_BTC,
                                    const std::vector<at::Tensor>& mixed_J) {
  const at::Tensor k_BTF = ops::relu_squared_(key(mixed_J[0]));
  return ops::gated_residual(residual_BTC, receptance(mixed_J[1]), value(k_BTF));
}

ModelVersion rwkv4_version() {
  return {
      .name = "rwkv4",
      .make_time_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<TimeMix> {
        return std::make_shared<Rwkv4TimeMix>(config);
      },
      .make_channel_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<ChannelMix> {
        return std::make_shared<Rwkv4ChannelMix>(config);
      },
      .initial_wkv = &initial_wkv,
      .initialise = &initialise,
      .traits = &traits};
}

}  // namespace rwkv
