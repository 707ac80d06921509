// The parts that every RWKV version is made of: a matrix and a layer norm.
#pragma once

#include <cstdint>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include "model/ops/layer_norm_shift_mix.h"

namespace rwkv {

// y = x W^T, W stored [out_features, in_features]; no bias. Registered as "weight".
// The weight is uninitialised until a version's initial values or a file fill it.
struct MatrixImpl : torch::nn::Module {
  MatrixImpl(int64_t out_features, int64_t in_features);
  at::Tensor forward(const at::Tensor& x) const;

  at::Tensor weight;
};
TORCH_MODULE(Matrix);

// x W + bias for x_BTI, W stored [in_features, out_features], as low-rank factors are. The bias may
// be undefined, or has as many elements as W has columns.
at::Tensor low_rank_product(const at::Tensor& x_BTI,
                            const at::Tensor& weight_IO,
                            const at::Tensor& bias = {});

// LayerNorm over the last axis, eps 1e-5, statistics in fp32. Registered as "weight" and "bias".
struct LayerNormImpl : torch::nn::Module {
  explicit LayerNormImpl(int64_t n_embd);
  at::Tensor forward(const at::Tensor& x) const;
  // x + delta normalised and mixed with its token shift: see model/ops/layer_norm_shift_mix.h.
  ops::LayerNormShiftMixOutput shift_mix(const at::Tensor& x_BTC,
                                         const at::Tensor& delta_BTC,
                                         const at::Tensor& carry_BC,
                                         const at::Tensor& mix_JC) const;

  at::Tensor weight;
  at::Tensor bias;
};
TORCH_MODULE(LayerNorm);

}  // namespace rwkv
