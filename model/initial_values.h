// What the versions' initial values are made with.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "model/model_config.h"

namespace rwkv {

// Orthonormal rows or columns (whichever are fewer) times the gain; a matrix.
void fill_orthogonal(at::Tensor& parameter, double gain, at::Generator generator);
// sqrt(rows / columns) of a matrix with more rows than columns; 1 for anything else.
double widening_gain(const at::Tensor& parameter);

// Of a parameter in a block.
struct BlockName {
  int64_t layer;
  std::string_view rest;  // of "blocks.3.att.key.weight": att.key.weight
};
// Throws c10::Error for another name.
BlockName parse_block_name(std::string_view name);

// How deep a layer lies: from 0 for the first to 1 for the last, and from 1 to 1 / n_layer.
double depth_up(const ModelConfig& config, int64_t layer);
double depth_down(const ModelConfig& config, int64_t layer);

// Channel by channel i / n, [n], fp64, and i / (n - 1); one channel has no span: 0.
at::Tensor channel_ratios(int64_t n);
at::Tensor channel_span(int64_t n);

// Sizes of `shape` above 1: 2 for a matrix.
int64_t num_wide_axes(at::IntArrayRef shape);

}  // namespace rwkv
