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

int64_t num_wide_axes(at::IntArrayRef shape) {
  return std::ranges::count_if(shape, [](int64_t size) { return size > 1; });
}

}  // namespace rwkv
