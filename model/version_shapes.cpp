#include "model/version_shapes.h"

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string_view>

#include <fnmatch.h>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

const auto& versions() {
  // The first that recognises tensors has them.
  static const std::array kVersions = {
      rwkv7_shapes(), rwkv6_shapes(), rwkv5_shapes(), rwkv4_shapes()};
  return kVersions;
}

std::string known_names() {
  std::string names;
  for (const VersionShapes& version : versions()) {
    names.append(names.empty() ? "" : ", ").append(version.name);
  }
  return names;
}

int64_t num_layers(const TensorShapes& shapes) {
  int64_t n_layer = 0;
  while (shapes.contains("blocks." + std::to_string(n_layer) + ".ln1.weight")) {
    ++n_layer;
  }
  return n_layer;
}

// A size of a tensor that may be missing or have other axes: 0.
int64_t size_if_there(const TensorShapes& shapes, std::string_view name, size_t axis) {
  const auto found = shapes.find(name);
  return found == shapes.end() || found->second.size() != 2 ? 0 : found->second[axis];
}

// RWKV-5 before 5.2: a norm of heads as there, but one decay and one bonus for each of them.
constexpr std::string_view kRwkv5Preview = "rwkv5.0 or rwkv5.1";
bool is_rwkv5_preview(const TensorShapes& shapes) {
  const auto decay = shapes.find("blocks.0.att.time_decay");
  return shapes.contains("blocks.0.att.ln_x.weight") &&
         shapes.contains("blocks.0.att.time_mix_k") && decay != shapes.end() &&
         decay->second.size() == 1;
}

// "" for none.
std::string_view version_of(const TensorShapes& shapes) {
  for (const VersionShapes& version : versions()) {
    if (version.recognises(shapes)) {
      return version.name;
    }
  }
  return is_rwkv5_preview(shapes) ? kRwkv5Preview : "";
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

const VersionShapes& find_version_shapes(std::string_view name) {
  for (const VersionShapes& version : versions()) {
    if (version.name == name) {
      return version;
    }
  }
  throw std::invalid_argument("model.version = \"" + std::string(name) +
                              "\": no such version; known are " + known_names());
}

const VersionShapes& recognise_version(const TensorShapes& shapes) {
  for (const VersionShapes& version : versions()) {
    if (version.recognises(shapes)) {
      return version;
    }
  }
  if (is_rwkv5_preview(shapes)) {
    throw std::runtime_error("is " + std::string(kRwkv5Preview) +
                             ", previews with one decay for each head, which are not supported; of "
                             "RWKV-5 use a release of 5.2");
  }
  throw std::runtime_error("holds " + std::to_string(shapes.size()) +
                           " tensors of no RWKV version known here; known are " + known_names());
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

const std::vector<int64_t>& shape_of(const TensorShapes& shapes, const std::string& name) {
  const auto found = shapes.find(name);
  if (found == shapes.end()) {
    throw std::runtime_error(name + " is missing, and every " + std::string(version_of(shapes)) +
                             " model has it");
  }
  return found->second;
}

const std::vector<int64_t>& matrix_shape_of(const TensorShapes& shapes, const std::string& name) {
  const std::vector<int64_t>& shape = shape_of(shapes, name);
  if (shape.size() != 2) {
    throw std::runtime_error(name + " has " + std::to_string(shape.size()) + " axes, expected 2");
  }
  return shape;
}

ModelConfig common_config_of(const TensorShapes& shapes, std::string_view version) {
  const std::vector<int64_t>& emb = matrix_shape_of(shapes, "emb.weight");
  if (emb[0] == 0 || emb[1] == 0) {
    throw std::runtime_error(
        "emb.weight is " + shape_text(emb) +
        ", expected [vocab_size, n_embd], both 1 or more; the file is damaged");
  }
  ModelConfig config;
  config.version = version;
  config.vocab_size = emb[0];
  config.n_embd = emb[1];
  config.n_layer = num_layers(shapes);
  return config;
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

int64_t head_size_of(const TensorShapes& shapes,
                     const std::string& name,
                     int64_t channels,
                     const char* channels_of) {
  const int64_t head_size = matrix_shape_of(shapes, name)[1];
  if (head_size == 0 || channels % head_size != 0) {
    throw std::runtime_error(name + " has heads of " + std::to_string(head_size) +
                             " channels, expected a divisor of the " + std::to_string(channels) +
                             " of " + channels_of + "; the file is damaged");
  }
  return head_size;
}

TensorShapes common_parameters(const ModelConfig& config) {
  const int64_t C = config.n_embd, V = config.vocab_size;
  TensorShapes shapes{{"emb.weight", {V, C}}, {"head.weight", {V, C}}};
  const auto add_norm = [&](const std::string& name) {
    shapes[name + ".weight"] = {C};
    shapes[name + ".bias"] = {C};
  };
  add_norm("ln_out");
  add_norm("blocks.0.ln0");
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    add_norm("blocks." + std::to_string(layer) + ".ln1");
    add_norm("blocks." + std::to_string(layer) + ".ln2");
  }
  return shapes;
}

void fill_open(int64_t& value, int64_t with) {
  value = value == 0 ? with : value;
}

void require_whole_heads(const ModelConfig& config, const char* key, int64_t channels) {
  if (config.head_size < 0 || channels % config.head_size != 0) {
    throw std::invalid_argument("model." + std::string(key) + " = " + std::to_string(channels) +
                                ": must be a multiple of model.head_size, " +
                                std::to_string(config.head_size));
  }
}

void refuse_key(const char* key, int64_t value, std::string_view version) {
  if (value != 0) {
    throw std::invalid_argument("model." + std::string(key) + " = " + std::to_string(value) + ": " +
                                std::string(version) + " has none; leave the key out");
  }
}

}  // namespace rwkv
