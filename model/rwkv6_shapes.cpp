// RWKV-6's tensors. Source: BlinkDL/RWKV-LM RWKV-v5/src/model.py.
#include <algorithm>
#include <stdexcept>

#include "model/version_shapes.h"

namespace rwkv {
namespace {

constexpr int64_t kHeadSize = 64;
// The author's up to 4096 channels, from where on both are twice as wide.
constexpr int64_t kRankMix = 32;
constexpr int64_t kRankDecay = 64;
constexpr int64_t kNumMixes = 5;  // w, k, v, r, g

bool recognises(const TensorShapes& shapes) {
  return shapes.contains("blocks.0.att.time_maa_x");
}

ModelConfig config_of_file(const TensorShapes& shapes) {
  ModelConfig config = common_config_of(shapes, "rwkv6");
  const int64_t C = config.n_embd;
  config.dim_att = matrix_shape_of(shapes, "blocks.0.att.key.weight")[0];
  config.dim_ffn = matrix_shape_of(shapes, "blocks.0.ffn.key.weight")[0];
  const int64_t A = config.dim_att;
  config.head_size = head_size_of(shapes, "blocks.0.att.time_faaaa", A, "att.key.weight");
  const int64_t columns = matrix_shape_of(shapes, "blocks.0.att.time_maa_w1")[1];
  if (columns == 0 || columns % kNumMixes != 0) {
    throw std::runtime_error("blocks.0.att.time_maa_w1 has " + std::to_string(columns) +
                             " columns, expected a multiple of 5: one group for each of w, k, v, r "
                             "and g; the file is damaged");
  }
  config.rank_mix = columns / kNumMixes;
  config.rank_decay = matrix_shape_of(shapes, "blocks.0.att.time_decay_w1")[1];
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    require_shape(shapes, block + ".ln1.weight", {C});
    require_shape(shapes, block + ".att.time_faaaa", {A / config.head_size, config.head_size});
    require_shape(shapes, block + ".att.key.weight", {A, C});
    require_shape(shapes, block + ".att.time_maa_w1", {C, columns});
    require_shape(shapes, block + ".att.time_decay_w1", {C, config.rank_decay});
    require_shape(shapes, block + ".ffn.key.weight", {config.dim_ffn, C});
  }
  return config;
}

void resolve(ModelConfig& config) {
  fill_open(config.dim_att, config.n_embd);
  // The author's: 3.5 times n_embd, down to a multiple of 32.
  fill_open(config.dim_ffn, std::max<int64_t>(32, config.n_embd * 7 / 2 / 32 * 32));
  fill_open(config.head_size, kHeadSize);
  const int64_t widening = config.n_embd >= 4096 ? 2 : 1;
  fill_open(config.rank_mix, widening * kRankMix);
  fill_open(config.rank_decay, widening * kRankDecay);
  refuse_key("rank_iclr", config.rank_iclr, "rwkv6");
  refuse_key("rank_value", config.rank_value, "rwkv6");
  refuse_key("rank_gate", config.rank_gate, "rwkv6");
  require_whole_heads(config, "dim_att", config.dim_att);
}

TensorShapes parameters(const ModelConfig& config) {
  const int64_t C = config.n_embd, A = config.dim_att, F = config.dim_ffn, N = config.head_size;
  const int64_t R = config.rank_mix, D = config.rank_decay;
  TensorShapes shapes = common_parameters(config);
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer) + ".";
    for (const char* name : {"att.time_maa_x",
                             "att.time_maa_w",
                             "att.time_maa_k",
                             "att.time_maa_v",
                             "att.time_maa_r",
                             "att.time_maa_g",
                             "ffn.time_maa_k",
                             "ffn.time_maa_r"}) {
      shapes[block + name] = {1, 1, C};
    }
    shapes[block + "att.time_maa_w1"] = {C, kNumMixes * R};
    shapes[block + "att.time_maa_w2"] = {kNumMixes, R, C};
    shapes[block + "att.time_decay"] = {1, 1, A};
    shapes[block + "att.time_decay_w1"] = {C, D};
    shapes[block + "att.time_decay_w2"] = {D, A};
    shapes[block + "att.time_faaaa"] = {A / N, N};
    for (const char* name : {"receptance", "key", "value", "gate"}) {
      shapes[block + "att." + name + ".weight"] = {A, C};
    }
    shapes[block + "att.output.weight"] = {C, A};
    shapes[block + "att.ln_x.weight"] = shapes[block + "att.ln_x.bias"] = {A};
    shapes[block + "ffn.key.weight"] = {F, C};
    shapes[block + "ffn.receptance.weight"] = {C, C};
    shapes[block + "ffn.value.weight"] = {C, F};
  }
  return shapes;
}

}  // namespace

VersionShapes rwkv6_shapes() {
  return {.name = "rwkv6",
          .recognises = &recognises,
          .config_of = &config_of_file,
          .resolve = &resolve,
          .parameters = &parameters};
}

}  // namespace rwkv
