#include "model/version_shapes.h"

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string_view>

#include <fnmatch.h>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

const std::vector<int64_t>& shape_of(const TensorShapes& shapes, const std::string& name) {
  const auto found = shapes.find(name);
  if (found == shapes.end()) {
    throw std::runtime_error(name + " is missing, and every rwkv4 model has it");
  }
  return found->second;
}

// Size of the first axis of a matrix.
int64_t num_rows(const TensorShapes& shapes, const std::string& name) {
  const std::vector<int64_t>& shape = shape_of(shapes, name);
  if (shape.size() != 2) {
    throw std::runtime_error(name + " has " + std::to_string(shape.size()) + " axes, expected 2");
  }
  return shape[0];
}

void require_shape(const TensorShapes& shapes,
                   const std::string& name,
                   const std::vector<int64_t>& expected) {
  const std::vector<int64_t>& shape = shape_of(shapes, name);
  if (shape != expected) {
    throw std::runtime_error(name + " is " + shape_text(shape) + ", expected " +
                             shape_text(expected) + " beside emb.weight, " +
                             shape_text(shape_of(shapes, "emb.weight")) +
                             ", and blocks.0; the file is damaged");
  }
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

int64_t num_elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

bool matches_any(const std::vector<std::string>& patterns, const std::string& name) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
  });
}

bool is_rwkv4(const TensorShapes& shapes) {
  return shapes.contains("blocks.0.att.time_first") && shapes.contains("blocks.0.att.time_mix_k") &&
         !shapes.contains("blocks.0.att.ln_x.weight");
}

ModelConfig rwkv4_config_of(const TensorShapes& shapes) {
  ModelConfig config;
  config.version = "rwkv4";
  config.vocab_size = num_rows(shapes, "emb.weight");
  config.n_embd = shape_of(shapes, "emb.weight")[1];
  config.dim_att = num_rows(shapes, "blocks.0.att.key.weight");
  config.dim_ffn = num_rows(shapes, "blocks.0.ffn.key.weight");
  config.n_layer = num_layers(shapes);
  // A model of these sizes is built before the tensors are loaded into it. What names a size, or a
  // layer, must therefore have the elements of one: a shape with a 0 in it costs a file nothing.
  if (config.vocab_size == 0 || config.n_embd == 0) {
    throw std::runtime_error(
        "emb.weight is " + shape_text(shape_of(shapes, "emb.weight")) +
        ", expected [vocab_size, n_embd], both 1 or more; the file is damaged");
  }
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer);
    require_shape(shapes, block + ".ln1.weight", {config.n_embd});
    require_shape(shapes, block + ".att.key.weight", {config.dim_att, config.n_embd});
    require_shape(shapes, block + ".ffn.key.weight", {config.dim_ffn, config.n_embd});
  }
  return config;
}

void resolve_rwkv4(ModelConfig& config) {
  if (config.dim_att == 0) {
    config.dim_att = config.n_embd;
  }
  if (config.dim_ffn == 0) {
    config.dim_ffn = 4 * config.n_embd;
  }
  if (config.head_size != 0) {
    throw std::invalid_argument("model.head_size = " + std::to_string(config.head_size) +
                                ": rwkv4 has no heads; leave the key out");
  }
}

TensorShapes rwkv4_shapes(const ModelConfig& config) {
  const int64_t C = config.n_embd, A = config.dim_att, F = config.dim_ffn, V = config.vocab_size;
  TensorShapes shapes{{"emb.weight", {V, C}}, {"head.weight", {V, C}}};
  const auto add_norm = [&](const std::string& name) {
    shapes[name + ".weight"] = {C};
    shapes[name + ".bias"] = {C};
  };
  add_norm("ln_out");
  add_norm("blocks.0.ln0");
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    const std::string block = "blocks." + std::to_string(layer) + ".";
    add_norm(block + "ln1");
    add_norm(block + "ln2");
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
