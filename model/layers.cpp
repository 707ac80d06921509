#include "model/layers.h"

#include <ATen/ATen.h>

#include "model/ops/few_rows_linear.h"

namespace rwkv {
namespace {

constexpr double kLayerNormEps = 1e-5;

}  // namespace

MatrixImpl::MatrixImpl(int64_t out_features, int64_t in_features)
    : weight(register_parameter("weight", at::empty({out_features, in_features}))) {}

at::Tensor MatrixImpl::forward(const at::Tensor& x) const {
  const bool few_rows = x.numel() <= ops::kFewRows * x.size(-1);
  if (few_rows && !at::GradMode::is_enabled() && x.is_cpu() && x.scalar_type() != at::kDouble) {
    return ops::few_rows_linear(x, weight);
  }
  return at::linear(x, weight);
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
