// The parts that every RWKV version is made of: a matrix, a layer norm, the token shift.
#pragma once

#include <cstdint>

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

namespace rwkv {

// y = x W^T, W stored [out_features, in_features]; no bias. Registered as "weight".
// The weight is uninitialised until a version's initial values or a file fill it.
struct MatrixImpl : torch::nn::Module {
  MatrixImpl(int64_t out_features, int64_t in_features);
  at::Tensor forward(const at::Tensor& x) const;

  at::Tensor weight;
};
TORCH_MODULE(Matrix);

// LayerNorm over the last axis, eps 1e-5, statistics in fp32. Registered as "weight" and "bias".
struct LayerNormImpl : torch::nn::Module {
  explicit LayerNormImpl(int64_t n_embd);
  at::Tensor forward(const at::Tensor& x) const;

  at::Tensor weight;
  at::Tensor bias;
};
TORCH_MODULE(LayerNorm);

// Each token's predecessor: row t is x[t - 1], row 0 is the carried row.
//   x_BTC     [B, T, C], T >= 1
//   carry_BC  [B, C], the last row of the sequence before; zeros at its start
at::Tensor token_shift(const at::Tensor& x_BTC, const at::Tensor& carry_BC);

}  // namespace rwkv
