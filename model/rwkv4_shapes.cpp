// RWKV-4's tensors. Source: BlinkDL/RWKV-LM RWKV-v4neo/src/model.py.
#include "model/version_shapes.h"

namespace rwkv {
namespace {

bool recognises(const TensorShapes& shapes) {
  return shapes.contains("blocks.0.att.time_first") && shapes.contains("blocks.0.att.time_mix_k") &&
         !shapes.contains("blocks.0.att.ln_x.weight");
}

ModelConfig config_of_file(const TensorShapes& shapes) {
  ModelConfig config = common_config_of(shapes, "rwkv4");
  config.dim_att = matrix_shape_of(shapes, "blocks.0.att.key.weight")[0];
  config.dim_ffn = matrix_shape_of(shapes, "blocks.0.ffn.key.weight")[0];
  // A model of these sizes is built before the tensors are loaded into it. What names a size, or a
  // layer, must therefore have the elements of one: a shape with a 0 in it costs a file nothing.
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    require_shape(shapes, block + ".ln1.weight", {config.n_embd});
    require_shape(shapes, block + ".att.key.weight", {config.dim_att, config.n_embd});
    require_shape(shapes, block + ".ffn.key.weight", {config.dim_ffn, config.n_embd});
  }
  return config;
}

void resolve(ModelConfig& config) {
  if (config.dim_att == 0) {
    config.dim_att = config.n_embd;
  }
  if (config.dim_ffn == 0) {
    config.dim_ffn = 4 * config.n_embd;
  }
  refuse_key("head_size", config.head_size, "rwkv4");
  refuse_key("rank_mix", config.rank_mix, "rwkv4");
  refuse_key("rank_decay", config.rank_decay, "rwkv4");
  refuse_key("rank_iclr", config.rank_iclr, "rwkv4");
  refuse_key("rank_value", config.rank_value, "rwkv4");
  refuse_key("rank_gate", config.rank_gate, "rwkv4");
}

TensorShapes parameters(const ModelConfig& config) {
  const int64_t C = config.n_embd, A = config.dim_att, F = config.dim_ffn;
  TensorShapes shapes = common_parameters(config);
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer) + ".";
    for (const char* name : {"att.time_decay", "att.time_first"}) {
      shapes[block + name] = {A};
    }
    for (const char* name : {"att.time_mix_k",
                             "att.time_mix_v",
                             "att.time_mix_r",
                             "ffn.time_mix_k",
                             "ffn.time_mix_r"}) {
      shapes[block + name] = {1, 1, C};
    }
    for (const char* name : {"att.key.weight", "att.value.weight", "att.receptance.weight"}) {
      shapes[block + name] = {A, C};
    }
    shapes[block + "att.output.weight"] = {C, A};
    shapes[block + "ffn.key.weight"] = {F, C};
    shapes[block + "ffn.receptance.weight"] = {C, C};
    shapes[block + "ffn.value.weight"] = {C, F};
  }
  return shapes;
}

}  // namespace

VersionShapes rwkv4_shapes() {
  return {.name = "rwkv4",
          .recognises = &recognises,
          .config_of = &config_of_file,
          .resolve = &resolve,
          .parameters = &parameters};
}

}  // namespace rwkv
