// What a weight file's names and shapes tell of the model in it, version by version: one row each.
// No Torch here: files are looked at, and runs planned, without it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/formats/weight_file.h"
#include "model/model_config.h"

namespace rwkv {

// Names and shapes of a weight file's tensors: all that telling a version and its sizes needs.
using TensorShapes = std::map<std::string, std::vector<int64_t>, std::less<>>;
TensorShapes shapes_of(const WeightFile& file);
int64_t num_elements(const std::vector<int64_t>& shape);

// Whether a tensor's name matches one of the patterns, which are those of file names: * any
// characters, ? one, [a-z] one of a set.
bool matches_any(const std::vector<std::string>& patterns, const std::string& name);

struct VersionShapes {
  std::string_view name;  // "rwkv4"

  // Whether the tensors are this version's; rows are asked in the table's order.
  bool (*recognises)(const TensorShapes& shapes);
  // The sizes that they have (ctx_len and group_norm_eps are not in a file: they stay the
  // defaults). Throws std::runtime_error naming a tensor that is missing or of an odd shape: of
  // each layer those are looked at that bound how much larger than the file a model of these sizes
  // is.
  ModelConfig (*config_of)(const TensorShapes& shapes);
  // Fills what a configuration leaves open and checks what is the version's own. Throws
  // std::invalid_argument naming the key.
  void (*resolve)(ModelConfig& config);
  // The names and shapes of all parameters of a model whose configuration is resolved.
  TensorShapes (*parameters)(const ModelConfig& config);
  // Patterns of parameters that a file may lack because nothing reads them; they are zero then.
  std::vector<std::string> unused = {};
};

// Throws std::invalid_argument listing the known names.
const VersionShapes& find_version_shapes(std::string_view name);
// Throws std::runtime_error saying that no known version has these tensors, or that they are a
// preview's of RWKV-5.
const VersionShapes& recognise_version(const TensorShapes& shapes);

// The version and sizes of a model that may be damaged, for looking at it: a size that no tensor
// tells is 0. Nothing if no row recognises it; a preview of RWKV-5, which is no version of the
// table, is told as "rwkv5.0 or rwkv5.1".
std::optional<ModelConfig> describe_shapes(const TensorShapes& shapes);

// ---- The rows, and what they are written with -------------------------------------------------

VersionShapes rwkv4_shapes();
VersionShapes rwkv5_shapes();
VersionShapes rwkv6_shapes();
VersionShapes rwkv7_shapes();

// The tensor's shape. Throws std::runtime_error if it is missing.
const std::vector<int64_t>& shape_of(const TensorShapes& shapes, const std::string& name);
// The same of a matrix. Throws std::runtime_error for another number of axes.
const std::vector<int64_t>& matrix_shape_of(const TensorShapes& shapes, const std::string& name);
// version, vocab_size, n_embd and n_layer, the first two from emb.weight. Throws as above, and for
// a size of 0, whose shape costs a file nothing.
ModelConfig common_config_of(const TensorShapes& shapes, std::string_view version);
// Throws std::runtime_error unless the tensor has this shape, which follows from emb.weight and
// block 0.
void require_shape(const TensorShapes& shapes,
                   const std::string& name,
                   const std::vector<int64_t>& expected);
// N of a tensor of heads, [H, N]. Throws std::runtime_error unless heads of so many make the
// channels, which `channels_of` has.
int64_t head_size_of(const TensorShapes& shapes,
                     const std::string& name,
                     int64_t channels,
                     const char* channels_of);
// emb, head, ln_out and the norms of the blocks, which all versions have.
TensorShapes common_parameters(const ModelConfig& config);
// Fills a value that a configuration leaves open.
void fill_open(int64_t& value, int64_t with);
// Throws std::invalid_argument naming the key unless heads of model.head_size make its channels.
void require_whole_heads(const ModelConfig& config, const char* key, int64_t channels);
// "model.head_size = 8: rwkv4 has none; leave the key out", unless the value is 0.
void refuse_key(const char* key, int64_t value, std::string_view version);

}  // namespace rwkv
