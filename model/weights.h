// Between models and weight files.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/formats/weight_file.h"
#include "model/rwkv_model.h"

namespace rwkv {

// Names and tensors in a fixed order.
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

at::ScalarType to_scalar_type(WeightDtype dtype);
// Throws std::invalid_argument for a type that files do not hold.
WeightDtype to_weight_dtype(at::ScalarType type);

// A copy of a file's tensor on the CPU, contiguous.
at::Tensor to_tensor(const StoredTensor& stored);
// Descriptions of CPU tensors for a writer; they must stay alive and be contiguous.
std::vector<TensorToWrite> to_write(const NamedTensors& tensors);

// What load_weights() may accept beside exactly the model's tensors. With no value given: nothing.
struct LoadRules {
  std::vector<std::string> may_be_missing = {};     // patterns; such parameters keep their values
  std::vector<std::string> may_be_unexpected = {};  // patterns; such tensors are left out
  // A model of a larger vocabulary than the file's: emb.weight and head.weight take the file's rows
  // first; the rows after them become the mean of those, or zero.
  enum class NewRows { kRefused, kMean, kZero };
  NewRows new_rows = NewRows::kRefused;
};

// What load_weights() made use of in its rules.
struct LoadReport {
  std::vector<std::string> missing;   // parameters that kept their values
  std::vector<std::string> left_out;  // tensors of the file
  int64_t new_rows = 0;               // of emb.weight and head.weight each
};

// Copies a file's tensors into the model's parameters, converting dtypes. Vectors may have other
// axes of size 1 than the model's ([C] for [1, 1, C]).
// Throws std::runtime_error naming the file and the first tensor that is missing, unexpected or of
// another shape, with both shapes.
LoadReport load_weights(RwkvModel& model, const WeightFile& file, const LoadRules& rules = {});

// A model with uninitialised weights in the given dtype. They lie as close together as if it had
// been made so: what is converted instead leaves gaps in which pages stay.
RwkvModel empty_model(const ModelConfig& config, at::ScalarType dtype);

// The version and sizes that a file's tensors tell. Throws std::runtime_error naming the file.
ModelConfig config_of(const WeightFile& file);

// Builds the model that a file or checkpoint directory holds, in the given dtype: version and
// sizes are told by the tensors. Throws std::runtime_error as load_weights does.
RwkvModel open_model(const std::string& path, at::ScalarType dtype);

}  // namespace rwkv
