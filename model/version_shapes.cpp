#include "model/version_shapes.h"

#include <stdexcept>
#include <string_view>

namespace rwkv {
namespace {

// Size of an axis of a tensor that has to have `rank` axes.
int64_t size_of_axis(const TensorShapes& shapes,
                     const std::string& name,
                     size_t rank,
                     size_t axis) {
  const auto found = shapes.find(name);
  if (found == shapes.end()) {
    throw std::runtime_error(name + " is missing, and every rwkv4 model has it");
  }
  if (found->second.size() != rank) {
    throw std::runtime_error(name + " has " + std::to_string(found->second.size()) +
                             " axes, expected " + std::to_string(rank));
  }
  return found->second[axis];
}

int64_t num_layers(const TensorShapes& shapes) {
  int64_t n_layer = 0;
  while (shapes.contains("blocks." + std::to_string(n_layer) + ".ln1.weight")) {
    ++n_layer;
  }
  return n_layer;
}

// The same of a tensor that may be missing or have other axes: 0.
int64_t size_if_there(const TensorShapes& shapes, std::string_view name, size_t axis) {
  const auto found = shapes.find(name);
  return found == shapes.end() || found->second.size() != 2 ? 0 : found->second[axis];
}

std::string_view version_of(const TensorShapes& shapes) {
  if (shapes.contains("blocks.0.att.r_k")) {
    return "rwkv7";
  }
  if (shapes.contains("blocks.0.att.time_maa_x")) {
    return "rwkv6";
  }
  if (shapes.contains("blocks.0.att.ln_x.weight") && shapes.contains("blocks.0.att.time_mix_k")) {
    return "rwkv5";
  }
  return is_rwkv4(shapes) ? "rwkv4" : "";
}

}  // namespace

TensorShapes shapes_of(const WeightFile& file) {
  TensorShapes shapes;
  for (const StoredTensor& tensor : file.tensors) {
    shapes[tensor.name] = tensor.shape;
  }
  return shapes;
}

bool is_rwkv4(const TensorShapes& shapes) {
  return shapes.contains("blocks.0.att.time_first") && shapes.contains("blocks.0.att.time_mix_k") &&
         !shapes.contains("blocks.0.att.ln_x.weight");
}

ModelConfig rwkv4_config_of(const TensorShapes& shapes) {
  ModelConfig config;
  config.version = "rwkv4";
  config.vocab_size = size_of_axis(shapes, "emb.weight", 2, 0);
  config.n_embd = size_of_axis(shapes, "emb.weight", 2, 1);
  config.dim_att = size_of_axis(shapes, "blocks.0.att.key.weight", 2, 0);
  config.dim_ffn = size_of_axis(shapes, "blocks.0.ffn.key.weight", 2, 0);
  config.n_layer = num_layers(shapes);
  return config;
}

std::optional<ModelConfig> describe_shapes(const TensorShapes& shapes) {
  const std::string_view version = version_of(shapes);
  if (version.empty()) {
    return std::nullopt;
  }
  ModelConfig config;
  config.version = version;
  config.n_layer = num_layers(shapes);
  config.vocab_size = size_if_there(shapes, "emb.weight", 0);
  config.n_embd = size_if_there(shapes, "emb.weight", 1);
  config.dim_att = size_if_there(shapes, "blocks.0.att.key.weight", 0);
  config.dim_ffn = size_if_there(shapes, "blocks.0.ffn.key.weight", 0);
  const char* of_heads = version == "rwkv7" ? "blocks.0.att.r_k" : "blocks.0.att.time_faaaa";
  config.head_size = size_if_there(shapes, of_heads, 1);
  return config;
}

}  // namespace rwkv
