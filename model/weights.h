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

TensorShapes shapes_of(const WeightFile& file);

// Copies a file's tensors into the model's parameters, converting dtypes. Vectors may have other
// axes of size 1 than the model's ([C] for [1, 1, C]).
// Throws std::runtime_error naming the file and the first tensor that is missing, unexpected or of
// another shape, with both shapes.
void load_weights(RwkvModel& model, const WeightFile& file);

// Builds the model that a file or checkpoint directory holds, in the given dtype: version and
// sizes are told by the tensors. Throws std::runtime_error as load_weights does.
RwkvModel open_model(const std::string& path, at::ScalarType dtype);

}  // namespace rwkv
