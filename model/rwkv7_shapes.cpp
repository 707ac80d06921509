// RWKV-7's tensors. Source: BlinkDL/RWKV-LM RWKV-v7/train_temp/src/model.py.
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "model/version_shapes.h"

namespace rwkv {
namespace {

constexpr int64_t kHeadSize = 64;

bool recognises(const TensorShapes& shapes) {
  return shapes.contains("blocks.0.att.r_k");
}

// Columns of a low-rank factor in the first block that has it: block 0 may lack those of the value
// residual, and a model of one block has none then.
int64_t rank_in(const TensorShapes& shapes, const std::string& factor) {
  for (const char* block : {"blocks.0.att.", "blocks.1.att."}) {
    if (shapes.contains(block + factor)) {
      return matrix_shape_of(shapes, block + factor)[1];
    }
  }
  return 0;
}

ModelConfig config_of_file(const TensorShapes& shapes) {
  ModelConfig config = common_config_of(shapes, "rwkv7");
  const int64_t C = config.n_embd;
  config.dim_att = C;
  config.dim_ffn = matrix_shape_of(shapes, "blocks.0.ffn.key.weight")[0];
  config.head_size = head_size_of(shapes, "blocks.0.att.r_k", C, "emb.weight");
  config.rank_decay = rank_in(shapes, "w1");
  config.rank_iclr = rank_in(shapes, "a1");
  config.rank_value = rank_in(shapes, "v1");
  config.rank_gate = rank_in(shapes, "g1");
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    require_shape(shapes, block + ".ln1.weight", {C});
    require_shape(shapes, block + ".att.r_k", {C / config.head_size, config.head_size});
    require_shape(shapes, block + ".att.key.weight", {C, C});
    require_shape(shapes, block + ".att.w1", {C, config.rank_decay});
    require_shape(shapes, block + ".att.a1", {C, config.rank_iclr});
    require_shape(shapes, block + ".att.g1", {C, config.rank_gate});
    if (layer > 0) {
      require_shape(shapes, block + ".att.v1", {C, config.rank_value});
    }
    require_shape(shapes, block + ".ffn.key.weight", {config.dim_ffn, C});
  }
  return config;
}

// The author's rank: a multiple of 32 near factor * sqrt(n_embd); halves go to the even one.
int64_t rank_for(int64_t n_embd, double factor) {
  const double steps = std::nearbyint(factor * std::sqrt(static_cast<double>(n_embd)) / 32);
  return 32 * std::max<int64_t>(1, static_cast<int64_t>(steps));
}

void resolve(ModelConfig& config) {
  fill_open(config.dim_att, config.n_embd);
  fill_open(config.dim_ffn, 4 * config.n_embd);
  fill_open(config.head_size, kHeadSize);
  fill_open(config.rank_decay, rank_for(config.n_embd, 2.5));
  fill_open(config.rank_iclr, rank_for(config.n_embd, 2.5));
  fill_open(config.rank_value, rank_for(config.n_embd, 1.7));
  fill_open(config.rank_gate, rank_for(config.n_embd, 5));
  refuse_key("rank_mix", config.rank_mix, "rwkv7");
  if (config.dim_att != config.n_embd) {
    throw std::invalid_argument("model.dim_att = " + std::to_string(config.dim_att) +
                                ": rwkv7 has n_embd = " + std::to_string(config.n_embd) +
                                "; leave the key out");
  }
  require_whole_heads(config, "n_embd", config.n_embd);
}

TensorShapes parameters(const ModelConfig& config) {
  const int64_t C = config.n_embd, F = config.dim_ffn, N = config.head_size;
  TensorShapes shapes = common_parameters(config);
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer) + ".";
    for (const char* name : {"att.x_r",
                             "att.x_w",
                             "att.x_k",
                             "att.x_v",
                             "att.x_a",
                             "att.x_g",
                             "att.w0",
                             "att.a0",
                             "att.v0",
                             "att.k_k",
                             "att.k_a",
                             "ffn.x_k"}) {
      shapes[block + name] = {1, 1, C};
    }
    for (const auto& [name, rank] : {std::pair{"w", config.rank_decay},
                                     std::pair{"a", config.rank_iclr},
                                     std::pair{"v", config.rank_value},
                                     std::pair{"g", config.rank_gate}}) {
      shapes[block + "att." + name + "1"] = {C, rank};
      shapes[block + "att." + name + "2"] = {rank, C};
    }
    shapes[block + "att.r_k"] = {C / N, N};
    for (const char* name : {"receptance", "key", "value", "output"}) {
      shapes[block + "att." + name + ".weight"] = {C, C};
    }
    shapes[block + "att.ln_x.weight"] = shapes[block + "att.ln_x.bias"] = {C};
    shapes[block + "ffn.key.weight"] = {F, C};
    shapes[block + "ffn.value.weight"] = {C, F};
  }
  return shapes;
}

}  // namespace

VersionShapes rwkv7_shapes() {
  return {.name = "rwkv7",
          .recognises = &recognises,
          .config_of = &config_of_file,
          .resolve = &resolve,
          .parameters = &parameters,
          .unused = {"blocks.0.att.v[012]"}};
}

}  // namespace rwkv
