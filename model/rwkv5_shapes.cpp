// RWKV-5.2's tensors. Source: BlinkDL/RWKV-LM RWKV-v5/src/model.py.
#include <algorithm>

#include "model/version_shapes.h"

namespace rwkv {
namespace {

constexpr int64_t kHeadSize = 64;

bool recognises(const TensorShapes& shapes) {
  // 5.2 alone has a decay for each channel: the previews before it are other models.
  const auto decay = shapes.find("blocks.0.att.time_decay");
  return shapes.contains("blocks.0.att.time_faaaa") && shapes.contains("blocks.0.att.time_mix_g") &&
         decay != shapes.end() && decay->second.size() == 2;
}

ModelConfig config_of_file(const TensorShapes& shapes) {
  ModelConfig config = common_config_of(shapes, "rwkv5");
  const int64_t C = config.n_embd;
  config.dim_att = matrix_shape_of(shapes, "blocks.0.att.key.weight")[0];
  config.dim_ffn = matrix_shape_of(shapes, "blocks.0.ffn.key.weight")[0];
  const int64_t A = config.dim_att;
  config.head_size = head_size_of(shapes, "blocks.0.att.time_faaaa", A, "att.key.weight");
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    require_shape(shapes, block + ".ln1.weight", {C});
    require_shape(shapes, block + ".att.time_faaaa", {A / config.head_size, config.head_size});
    require_shape(shapes, block + ".att.key.weight", {A, C});
    require_shape(shapes, block + ".ffn.key.weight", {config.dim_ffn, C});
  }
  return config;
}

void resolve(ModelConfig& config) {
  fill_open(config.dim_att, config.n_embd);
  // The author's: 3.5 times n_embd, down to a multiple of 32.
  fill_open(config.dim_ffn, std::max<int64_t>(32, config.n_embd * 7 / 2 / 32 * 32));
  fill_open(config.head_size, kHeadSize);
  refuse_key("rank_mix", config.rank_mix, "rwkv5");
  refuse_key("rank_decay", config.rank_decay, "rwkv5");
  refuse_key("rank_iclr", config.rank_iclr, "rwkv5");
  refuse_key("rank_value", config.rank_value, "rwkv5");
  refuse_key("rank_gate", config.rank_gate, "rwkv5");
  require_whole_heads(config, "dim_att", config.dim_att);
}

TensorShapes parameters(const ModelConfig& config) {
  const int64_t C = config.n_embd, A = config.dim_att, F = config.dim_ffn, N = config.head_size;
  TensorShapes shapes = common_parameters(config);
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer) + ".";
    for (const char* name : {"att.time_mix_k",
                             "att.time_mix_v",
                             "att.time_mix_r",
                             "att.time_mix_g",
                             "ffn.time_mix_k",
                             "ffn.time_mix_r"}) {
      shapes[block + name] = {1, 1, C};
    }
    shapes[block + "att.time_decay"] = shapes[block + "att.time_faaaa"] = {A / N, N};
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

VersionShapes rwkv5_shapes() {
  return {.name = "rwkv5",
          .recognises = &recognises,
          .config_of = &config_of_file,
          .resolve = &resolve,
          .parameters = &parameters};
}

}  // namespace rwkv
