#include "model/layers.h"

#include <ATen/ATen.h>

#include "model/ops/few_rows_linear.h"

namespace rwkv {
namespace {

constexpr double kLayerNormEps = 1e-5;

// Whether a product with x is one of few rows that has no gradient.
bool is_few_rows(const at::Tensor& x) {
  return x.numel() <= ops::kFewRows * x.size(-1) && !at::GradMode::is_enabled() && x.is_cpu() &&
         x.scalar_type() != at::kDouble;
}

}  // namespace

MatrixImpl::MatrixImpl(int64_t out_features, int64_t in_features)
    : weight(register_parameter("weight", at::empty({out_features, in_features}))) {}

at::Tensor MatrixImpl::forward(const at::Tensor& x) const {
  return is_few_rows(x) ? ops::few_rows_linear(x, weight) : at::linear(x, weight);
}

at::Tensor low_rank_product(const at::Tensor& x_BTI,
                            const at::Tensor& weight_IO,
                            const at::Tensor& bias) {
  if (is_few_rows(x_BTI)) {
    const at::Tensor y_BTO = ops::few_rows_linear(x_BTI, weight_IO.t());
    return bias.defined() ? y_BTO + bias : y_BTO;
  }
  if (!bias.defined()) {
    return at::matmul(x_BTI, weight_IO);
  }
  return at::addmm(bias.flatten(), x_BTI.flatten(0, 1), weight_IO)
      .view({x_BTI.size(0), x_BTI.size(1), weight_IO.size(1)});
}

LayerNormImpl::LayerNormImpl(int64_t n_embd)
    : weight(register_parameter("weight", at::empty({n_embd}))),
      bias(register_parameter("bias", at::empty({n_embd}))) {}

at::Tensor LayerNormImpl::forward(const at::Tensor& x) const {
  return at::layer_norm(x, weight.sizes(), weight, bias, kLayerNormEps);
}

ops::LayerNormShiftMixOutput LayerNormImpl::shift_mix(const at::Tensor& x_BTC,
                                                      const at::Tensor& delta_BTC,
                                                      const at::Tensor& carry_BC,
                                                      const at::Tensor& mix_JC) const {
  return ops::layer_norm_shift_mix(x_BTC, delta_BTC, weight, bias, carry_BC, mix_JC, kLayerNormEps);
}

}  // namespace rwkv
