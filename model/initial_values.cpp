#include "model/initial_values.h"

#include <algorithm>
#include <cmath>
#include <string>

#include <ATen/ATen.h>

namespace rwkv {

void fill_orthogonal(at::Tensor& parameter, double gain, at::Generator generator) {
  const int64_t rows = parameter.size(0);
  const int64_t cols = parameter.size(1);
  const at::Tensor normal =
      at::randn({std::max(rows, cols), std::min(rows, cols)}, generator, at::kFloat);
  auto [q, r] = at::linalg_qr(normal);
  // Without the signs of R's diagonal the factor would not be uniform over orthogonal matrices.
  q = q * r.diagonal().sign();
  parameter.copy_((rows >= cols ? q : q.t()) * gain);
}

double widening_gain(const at::Tensor& parameter) {
  if (parameter.dim() != 2 || parameter.size(0) <= parameter.size(1)) {
    return 1;
  }
  return std::sqrt(static_cast<double>(parameter.size(0)) / static_cast<double>(parameter.size(1)));
}

BlockName parse_block_name(std::string_view name) {
  constexpr std::string_view kPrefix = "blocks.";
  const size_t dot = name.find('.', kPrefix.size());
  TORCH_CHECK(name.starts_with(kPrefix) && dot != std::string_view::npos,
              "no model has a parameter called ",
              name);
  return {std::stoll(std::string(name.substr(kPrefix.size(), dot - kPrefix.size()))),
          name.substr(dot + 1)};
}

double depth_up(const ModelConfig& config, int64_t layer) {
  return config.n_layer == 1 ? 0.0
                             : static_cast<double>(layer) / static_cast<double>(config.n_layer - 1);
}

double depth_down(const ModelConfig& config, int64_t layer) {
  return 1.0 - static_cast<double>(layer) / static_cast<double>(config.n_layer);
}

at::Tensor channel_ratios(int64_t n) {
  return at::arange(n, at::kDouble) / static_cast<double>(n);
}

at::Tensor channel_span(int64_t n) {
  return at::arange(n, at::kDouble) / static_cast<double>(std::max<int64_t>(n - 1, 1));
}

bool initialise_common(std::string_view name,
                       at::Tensor& parameter,
                       double emb_range,
                       at::Generator generator) {
  if (name == "emb.weight") {
    parameter.uniform_(-emb_range, emb_range, generator);
  } else if (name == "head.weight") {
    fill_orthogonal(parameter, 0.5 * widening_gain(parameter), generator);
  } else if (name.ends_with(".bias")) {
    parameter.zero_();
  } else if (name.starts_with("ln_out.")) {
    parameter.fill_(1);
  } else {
    return false;
  }
  return true;
}

void initialise_headed(const ModelConfig& config,
                       const BlockName& name,
                       at::Tensor& parameter,
                       at::Generator generator) {
  const std::string_view rest = name.rest;
  if (rest == "att.ln_x.weight") {
    const double depth = static_cast<double>(name.layer + 1) / static_cast<double>(config.n_layer);
    parameter.fill_(std::pow(depth, 0.7));
  } else if (rest.starts_with("ln")) {
    parameter.fill_(1);
  } else if (rest == "att.receptance.weight" || rest == "att.value.weight" ||
             rest == "ffn.key.weight") {
    fill_orthogonal(parameter, 1, generator);
  } else if (rest == "att.key.weight" || rest == "att.gate.weight") {
    fill_orthogonal(parameter, 0.1, generator);
  } else {
    parameter.zero_();
  }
}

at::Tensor initial_headed_decay(const ModelConfig& config, int64_t layer) {
  return -6 + 5 * channel_span(config.dim_att).pow(0.7 + 1.3 * depth_up(config, layer));
}

at::Tensor initial_headed_bonus(const ModelConfig& config, int64_t layer) {
  const at::Tensor zigzag = (at::arange(config.dim_att, at::kDouble) + 1).remainder(3) - 1;
  return depth_up(config, layer) * (1 - channel_span(config.dim_att)) + 0.1 * zigzag;
}

at::Tensor initial_head_states(const ModelConfig& config,
                               int64_t batch_size,
                               const at::TensorOptions& options) {
  const int64_t N = config.head_size;
  return at::zeros({batch_size, config.dim_att / N, N, N}, options);
}

int64_t num_wide_axes(at::IntArrayRef shape) {
  return std::ranges::count_if(shape, [](int64_t size) { return size > 1; });
}

ParameterTraits headed_traits(std::string_view name, at::IntArrayRef shape) {
  const bool is_decay = name.ends_with(".att.time_decay");
  return {.lr_scale = is_decay ? 2.0 : 1.0,
          .weight_decay = num_wide_axes(shape) >= 2 && name.ends_with(".weight"),
          .keep_fp32 = is_decay || name.ends_with(".att.time_faaaa")};
}

}  // namespace rwkv
