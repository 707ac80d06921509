// What the versions' initial values are made with.
#pragma once

#include <cstdint>
#include <string_view>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "model/model_config.h"
#include "model/version_registry.h"

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

// emb, head, ln_out and all biases, whose values are the same in every version. Returns whether the
// parameter was one of these.
bool initialise_common(std::string_view name,
                       at::Tensor& parameter,
                       double emb_range,
                       at::Generator generator);

// ---- Versions with heads: 5 and later -----------------------------------------------------------

// These have a range of their own for emb.
constexpr double kHeadedEmbRange = 1e-4;
// The rest of a block, for what its version does not say: norms, matrices, and zero for others.
void initialise_headed(const ModelConfig& config,
                       const BlockName& name,
                       at::Tensor& parameter,
                       at::Generator generator);
// time_decay and time_faaaa of RWKV-5 and -6, [dim_att], fp64.
at::Tensor initial_headed_decay(const ModelConfig& config, int64_t layer);
at::Tensor initial_headed_bonus(const ModelConfig& config, int64_t layer);
// The wkv state before any token, a zero matrix a head: [B, H, N, N].
at::Tensor initial_head_states(const ModelConfig& config,
                               int64_t batch_size,
                               const at::TensorOptions& options);

// ---- Training classes ---------------------------------------------------------------------------

// Sizes of `shape` above 1: 2 for a matrix.
int64_t num_wide_axes(at::IntArrayRef shape);
// RWKV-5's and -6's.
ParameterTraits headed_traits(std::string_view name, at::IntArrayRef shape);

}  // namespace rwkv
