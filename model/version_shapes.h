// What a weight file's names and shapes tell of the model in it. No Torch here: files are looked at
// without it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
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

// Whether the tensors are an RWKV-4's, and the sizes they have (ctx_len is not in a file: it stays
// the default). Throws std::runtime_error naming a tensor that is missing or of an odd shape: of
// each layer those are looked at that bound how much larger than the file a model of these sizes
// is.
bool is_rwkv4(const TensorShapes& shapes);
ModelConfig rwkv4_config_of(const TensorShapes& shapes);

// Fills what an RWKV-4's configuration leaves open (dim_att, dim_ffn). Throws std::invalid_argument
// naming the key for a head_size, which it has not.
void resolve_rwkv4(ModelConfig& config);
// The names and shapes of all parameters of an RWKV-4 whose configuration is resolved.
TensorShapes rwkv4_shapes(const ModelConfig& config);

// The version ("rwkv4", "rwkv5", "rwkv6", "rwkv7") and sizes of a model of any RWKV-LM release,
// whether this program can train it or not, told by names that one version alone has. Nothing if it
// is none of them; a size that no tensor tells is 0.
// Source: BlinkDL/RWKV-LM RWKV-v4neo/src/model.py, RWKV-v5/src/model.py,
// RWKV-v7/train_temp/src/model.py.
std::optional<ModelConfig> describe_shapes(const TensorShapes& shapes);

}  // namespace rwkv
