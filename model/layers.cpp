#include "model/layers.h"

#include <ATen/ATen.h>

namespace rwkv {
namespace {

constexpr double kLayerNormEps = 1e-5;

}  // namespace

MatrixImpl::MatrixImpl(int64_t out_features, int64_t in_features)
    : weight(register_parameter("weight", at::empty({out_features, in_features}))) {}

at::Tensor MatrixImpl::forward(const at::Tensor& x) const {
  return at::linear(x, weight);
}

LayerNormImpl::LayerNormImpl(int64_t n_embd)
    : weight(register_parameter("weight", at::empty({n_embd}))),
      bias(register_parameter("bias", at::empty({n_embd}))) {}

at::Tensor LayerNormImpl::forward(const at::Tensor& x) const {
  return at::layer_norm(x, weight.sizes(), weight, bias, kLayerNormEps);
}

at::Tensor token_shift(const at::Tensor& x_BTC, const at::Tensor& carry_BC) {
  return at::cat({carry_BC.unsqueeze(1), x_BTC.slice(1, 0, x_BTC.size(1) - 1)}, 1);
}

}  // namespace rwkv
