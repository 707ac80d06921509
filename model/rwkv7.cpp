#include "model/rwkv7.h"

#include <cmath>

#include <ATen/ATen.h>

#include "model/initial_values.h"
#include "model/ops/relu_squared.h"
#include "model/ops/wkv7.h"
#include "model/ops/wkv7_inputs.h"
#include "model/ops/wkv7_output.h"

namespace rwkv {
namespace {

// The share that the present token has in a mix; parameters [1, 1, C] say the predecessor's.
at::Tensor present_shares(at::TensorList mixes) {
  return 1 - at::cat(mixes).flatten(1);
}

// ---- Initial values -----------------------------------------------------------------------------

// From -1 to 1 within each head, slow in the middle.
at::Tensor zigzag(const ModelConfig& config) {
  const int64_t N = config.head_size;
  // One channel has no span.
  const double half = std::max(0.5, static_cast<double>(N - 1) / 2);
  const at::Tensor m = (at::arange(config.n_embd, at::kLong).remainder(N).to(at::kDouble) -
                        static_cast<double>(N - 1) / 2) /
                       half;
  return m * m.abs();
}

// The vectors of a block by name; undefined for another.
at::Tensor initial_vector(const ModelConfig& config, int64_t layer, std::string_view name) {
  const double r01 = depth_up(config, layer), r10 = depth_down(config, layer);
  const at::Tensor d = channel_ratios(config.n_embd), span = channel_span(config.n_embd);
  const at::Tensor centred = span - 0.5;
  if (name == "att.x_r" || name == "att.x_g") {
    return 1 - d.pow(0.2 * r10);
  }
  if (name == "att.x_w" || name == "att.x_a") {
    return 1 - d.pow(0.9 * r10);
  }
  if (name == "att.x_k" || name == "att.x_v") {
    return 1 - d.pow(0.7 * r10);
  }
  if (name == "ffn.x_k") {
    return 1 - d.pow(std::pow(r10, 4));
  }
  if (name == "att.w0") {
    return -5.5 + 6 * span.pow(1 + std::pow(r01, 0.3)) + 2.5 * zigzag(config);
  }
  if (name == "att.a0") {
    return -0.19 + 0.3 * zigzag(config) + 0.4 * centred;
  }
  if (name == "att.v0") {
    return 0.73 - 0.4 * centred;
  }
  if (name == "att.k_k") {
    return 0.71 - 0.1 * centred;
  }
  if (name == "att.k_a") {
    return at::full({config.n_embd}, 1.02, at::kDouble);
  }
  if (name == "att.r_k") {
    return at::full({config.n_embd}, -0.04, at::kDouble);
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
  const bool is_low_rank = block.rest.starts_with("att.") && block.rest.size() == 6;
  if (const at::Tensor vector = initial_vector(config, block.layer, block.rest); vector.defined()) {
    parameter.copy_(vector.view_as(parameter));
  } else if (is_low_rank && block.rest.ends_with('2')) {
    fill_orthogonal(parameter, 0.1 * widening_gain(parameter), generator);
  } else {
    initialise_headed(config, block, parameter, generator);
  }
}

// ---- Training classes ---------------------------------------------------------------------------

ParameterTraits traits(std::string_view name, at::IntArrayRef shape) {
  ParameterTraits result;
  if (name.ends_with(".att.w0")) {
    result.lr_scale = 2;
    result.keep_fp32 = true;
  }
  result.weight_decay = num_wide_axes(shape) >= 2 && name.ends_with(".weight");
  return result;
}

}  // namespace

Rwkv7TimeMix::Rwkv7TimeMix(const ModelConfig& config, int64_t layer)
    : receptance(config.n_embd, config.n_embd),
      key(config.n_embd, config.n_embd),
      value(config.n_embd, config.n_embd),
      output(config.n_embd, config.n_embd),
      ln_x(config.n_embd),
      is_first_(layer == 0),
      group_norm_eps_(config.group_norm_eps) {
  const int64_t C = config.n_embd, N = config.head_size;
  const std::pair<const char*, at::Tensor*> vectors[] = {{"x_r", &x_r},
                                                         {"x_w", &x_w},
                                                         {"x_k", &x_k},
                                                         {"x_v", &x_v},
                                                         {"x_a", &x_a},
                                                         {"x_g", &x_g},
                                                         {"w0", &w0},
                                                         {"a0", &a0},
                                                         {"v0", &v0},
                                                         {"k_k", &k_k},
                                                         {"k_a", &k_a}};
  for (const auto& [name, tensor] : vectors) {
    *tensor = register_parameter(name, at::empty({1, 1, C}));
  }
  const auto register_pair =
      [&](const std::string& name, at::Tensor& down, at::Tensor& up, int64_t rank) {
        down = register_parameter(name + "1", at::empty({C, rank}));
        up = register_parameter(name + "2", at::empty({rank, C}));
      };
  register_pair("w", w1, w2, config.rank_decay);
  register_pair("a", a1, a2, config.rank_iclr);
  register_pair("v", v1, v2, config.rank_value);
  register_pair("g", g1, g2, config.rank_gate);
  r_k = register_parameter("r_k", at::empty({C / N, N}));
  register_module("receptance", receptance);
  register_module("key", key);
  register_module("value", value);
  register_module("output", output);
  register_module("ln_x", ln_x);
}

at::Tensor Rwkv7TimeMix::mixes() const {
  return present_shares({x_r, x_w, x_k, x_v, x_a, x_g});
}

at::Tensor Rwkv7TimeMix::w_raw(const at::Tensor& X_w) const {
  return low_rank_product(low_rank_product(X_w, w1).tanh_(), w2);
}

at::Tensor Rwkv7TimeMix::a_raw(const at::Tensor& X_a) const {
  return low_rank_product(low_rank_product(X_a, a1), a2, a0);
}

TimeMixTelemetry Rwkv7TimeMix::telemetry(const std::vector<at::Tensor>& mixed_J) const {
  // In fp32, for 1 - w may be as small as 2e-4.
  const at::Tensor w_log_BTC =
      -std::exp(-0.5) * at::sigmoid(w0 + w_raw(mixed_J[1]).to(w0.scalar_type()));
  return {.w_decay = w_log_BTC.exp(),
          .iclr_BTC = at::sigmoid(a_raw(mixed_J[4]).to(w0.scalar_type()))};
}

TimeMixOutput Rwkv7TimeMix::forward(const TimeMixInput& input) {
  const at::Tensor &X_r = input.mixed_J[0], &X_w = input.mixed_J[1], &X_k = input.mixed_J[2],
                   &X_v = input.mixed_J[3], &X_a = input.mixed_J[4], &X_g = input.mixed_J[5];
  const at::Tensor r_BTC = receptance(X_r);
  const at::Tensor v_BTC = value(X_v);
  const at::Tensor g_BTC = low_rank_product(low_rank_product(X_g, g1).sigmoid_(), g2);
  const at::Tensor v_raw_BTC =
      is_first_ ? at::Tensor() : low_rank_product(low_rank_product(X_v, v1), v2, v0);
  const ops::Wkv7InputsOutput in = ops::wkv7_inputs(key(X_k),
                                                    a_raw(X_a),
                                                    v_BTC,
                                                    v_raw_BTC,
                                                    input.v_first_BTC,
                                                    k_k.flatten(),
                                                    k_a.flatten(),
                                                    r_k.size(1));
  const ops::Wkv7Output wkv = ops::wkv7({.r_BTC = r_BTC,
                                         .w_raw_BTC = w_raw(X_w),
                                         .k_BTC = in.k_BTC,
                                         .v_BTC = in.v_BTC,
                                         .a_BTC = in.a_BTC,
                                         .b_BTC = in.b_BTC},
                                        w0.flatten(),
                                        input.wkv);
  const at::Tensor z_BTC = ops::wkv7_output(
      wkv.y_BTC, r_BTC, in.k_BTC, in.v_BTC, g_BTC, r_k, ln_x->weight, ln_x->bias, group_norm_eps_);
  return {.y_BTC = output(z_BTC),
          .wkv = wkv.state_BHNN,
          .v_first_BTC = is_first_ ? v_BTC : at::Tensor()};
}

Rwkv7ChannelMix::Rwkv7ChannelMix(const ModelConfig& config)
    : x_k(register_parameter("x_k", at::empty({1, 1, config.n_embd}))),
      key(config.dim_ffn, config.n_embd),
      value(config.n_embd, config.dim_ffn) {
  register_module("key", key);
  register_module("value", value);
}

at::Tensor Rwkv7ChannelMix::mixes() const {
  return present_shares({x_k});
}

at::Tensor Rwkv7ChannelMix::forward(const at::Tensor& residual_BTC,
                                    const std::vector<at::Tensor>& mixed_J) {
  return residual_BTC + value(ops::relu_squared_(key(mixed_J[0])));
}

ModelVersion rwkv7_version() {
  return {
      .name = "rwkv7",
      .make_time_mix = [](const ModelConfig& config, int64_t layer) -> std::shared_ptr<TimeMix> {
        return std::make_shared<Rwkv7TimeMix>(config, layer);
      },
      .make_channel_mix = [](const ModelConfig& config, int64_t) -> std::shared_ptr<ChannelMix> {
        return std::make_shared<Rwkv7ChannelMix>(config);
      },
      .initial_wkv = &initial_head_states,
      .initialise = &initialise,
      .traits = &traits};
}

}  // namespace rwkv
