#include "model/weights.h"

#include <algorithm>
#include <stdexcept>

#include <ATen/ATen.h>

#include "model/formats/format_registry.h"
#include "model/version_shapes.h"

namespace rwkv {
namespace {

struct DtypePair {
  WeightDtype stored;
  at::ScalarType scalar;
};
constexpr DtypePair kDtypes[] = {
    {WeightDtype::kF64, at::kDouble},
    {WeightDtype::kF32, at::kFloat},
    {WeightDtype::kF16, at::kHalf},
    {WeightDtype::kBf16, at::kBFloat16},
    {WeightDtype::kI64, at::kLong},
    {WeightDtype::kI32, at::kInt},
    {WeightDtype::kI16, at::kShort},
    {WeightDtype::kI8, at::kChar},
    {WeightDtype::kU8, at::kByte},
    {WeightDtype::kBool, at::kBool},
};

std::string to_string(at::IntArrayRef shape) {
  std::string text = "[";
  for (const int64_t size : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

// Sizes without the axes of size 1.
std::vector<int64_t> squeezed(at::IntArrayRef shape) {
  std::vector<int64_t> sizes;
  for (const int64_t size : shape) {
    if (size != 1) {
      sizes.push_back(size);
    }
  }
  return sizes;
}

// Where a parameter is loaded from, and by which rules.
struct Loading {
  const std::string& path;
  const ModelConfig& config;
  LoadRules::NewRows new_rows;
};

bool has_row_per_token(const std::string& name) {
  return name == "emb.weight" || name == "head.weight";
}

// A file's tensor into one of as many elements, a few rows at a time: another dtype needs a copy,
// and one of a whole embedding would be memory that nothing uses again.
void copy_in_pieces(at::Tensor& to, const StoredTensor& stored) {
  constexpr int64_t kPieceBytes = int64_t{4} << 20;
  if (stored.shape.empty() || stored.num_elements() == 0) {
    to.copy_(to_tensor(stored).view(to.sizes()));
    return;
  }
  const int64_t rows = stored.shape.front();
  const int64_t row_bytes = stored.num_elements() / rows * size_of(stored.dtype);
  const int64_t step = std::max<int64_t>(kPieceBytes / row_bytes, 1);
  const at::Tensor to_rows = to.view(stored.shape);
  StoredTensor piece = stored;
  for (int64_t begin = 0; begin < rows; begin += step) {
    piece.shape.front() = std::min(step, rows - begin);
    piece.offset = stored.offset + begin * stored.strides.front();
    to_rows.slice(0, begin, begin + piece.shape.front()).copy_(to_tensor(piece));
  }
}

// A matrix of fewer rows than the parameter: its rows first, then those that the rule says.
void load_with_new_rows(at::Tensor& parameter, const at::Tensor& rows, LoadRules::NewRows rule) {
  parameter.slice(0, 0, rows.size(0)).copy_(rows);
  at::Tensor added = parameter.slice(0, rows.size(0));
  if (rule == LoadRules::NewRows::kMean) {
    added.copy_(rows.to(at::kDouble).mean(0, /*keepdim=*/true).expand(added.sizes()));
  } else {
    added.zero_();
  }
}

void load_parameter(const std::string& name,
                    at::Tensor& parameter,
                    const StoredTensor& stored,
                    const Loading& loading) {
  if (!at::isFloatingType(to_scalar_type(stored.dtype))) {
    throw std::runtime_error(loading.path + ": " + name + " has elements of type " +
                             std::string(name_of(stored.dtype)) +
                             ", expected a float type; is the model quantized?");
  }
  if (squeezed(stored.shape) == squeezed(parameter.sizes())) {
    copy_in_pieces(parameter, stored);
  } else if (loading.new_rows != LoadRules::NewRows::kRefused && has_row_per_token(name) &&
             stored.shape.size() == 2 && stored.shape[1] == parameter.size(1) &&
             stored.shape[0] >= 1 && stored.shape[0] < parameter.size(0)) {
    load_with_new_rows(parameter, to_tensor(stored), loading.new_rows);
  } else {
    throw std::runtime_error(loading.path + ": " + name + " is " + to_string(stored.shape) +
                             ", expected " + to_string(parameter.sizes()) +
                             " for model.n_embd = " + std::to_string(loading.config.n_embd) +
                             ", n_layer = " + std::to_string(loading.config.n_layer) +
                             ", vocab_size = " + std::to_string(loading.config.vocab_size));
  }
}

}  // namespace

at::ScalarType to_scalar_type(WeightDtype dtype) {
  for (const DtypePair& pair : kDtypes) {
    if (pair.stored == dtype) {
      return pair.scalar;
    }
  }
  TORCH_CHECK(false, "WeightDtype ", static_cast<int>(dtype), " is not in the table");
}

WeightDtype to_weight_dtype(at::ScalarType type) {
  for (const DtypePair& pair : kDtypes) {
    if (pair.scalar == type) {
      return pair.stored;
    }
  }
  throw std::invalid_argument(std::string("tensors of type ") + c10::toString(type) +
                              " cannot be written to a weight file");
}

at::Tensor to_tensor(const StoredTensor& stored) {
  at::Tensor tensor = at::empty(stored.shape, to_scalar_type(stored.dtype));
  stored.copy_to(std::span(static_cast<std::byte*>(tensor.mutable_data_ptr()), tensor.nbytes()));
  return tensor;
}

std::vector<TensorToWrite> to_write(const NamedTensors& tensors) {
  std::vector<TensorToWrite> result;
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), name, " is not contiguous on the CPU");
    result.push_back({.name = name,
                      .dtype = to_weight_dtype(tensor.scalar_type()),
                      .shape = tensor.sizes().vec(),
                      .data = std::span(static_cast<const std::byte*>(tensor.const_data_ptr()),
                                        tensor.nbytes())});
  }
  return result;
}

LoadReport load_weights(RwkvModel& model, const WeightFile& file, const LoadRules& rules) {
  const at::NoGradGuard no_grad;
  LoadReport report;
  const ModelConfig& config = model->config();
  const std::vector<std::string>& unused = find_version_shapes(config.version).unused;
  auto parameters = model->named_parameters();
  for (auto& item : parameters) {
    const StoredTensor* stored = file.find(item.key());
    if (stored != nullptr) {
      load_parameter(item.key(), item.value(), *stored, {file.path, config, rules.new_rows});
      if (item.key() == "emb.weight") {
        report.new_rows = item.value().size(0) - stored->shape[0];
      }
    } else if (matches_any(unused, item.key())) {
      item.value().zero_();
    } else if (matches_any(rules.may_be_missing, item.key())) {
      report.missing.push_back(item.key());
    } else {
      throw std::runtime_error(file.path + ": " + item.key() + " is missing; expected " +
                               to_string(item.value().sizes()) + " for a model of version " +
                               config.version);
    }
  }
  for (const StoredTensor& stored : file.tensors) {
    if (parameters.contains(stored.name)) {
      continue;
    }
    if (!matches_any(rules.may_be_unexpected, stored.name)) {
      throw std::runtime_error(
          file.path + ": " + stored.name + " is unexpected in a model of version " +
          config.version + " with " + std::to_string(config.n_layer) +
          " layers; is it a variant, or does the file hold more than weights?");
    }
    report.left_out.push_back(stored.name);
  }
  return report;
}

RwkvModel empty_model(const ModelConfig& config, at::ScalarType dtype) {
  RwkvModel model(config);
  std::vector<std::vector<int64_t>> shapes;
  for (at::Tensor& parameter : model->parameters()) {
    shapes.push_back(parameter.sizes().vec());
    parameter.set_data(at::empty({0}, parameter.options()));
  }
  model->set_dtype(dtype);
  size_t index = 0;
  for (at::Tensor& parameter : model->parameters()) {
    parameter.set_data(at::empty(shapes[index++], parameter.options()));
  }
  return model;
}

ModelConfig config_of(const WeightFile& file) {
  const TensorShapes shapes = shapes_of(file);
  try {
    ModelConfig config = recognise_version(shapes).config_of(shapes);
    // Sizes from a file are the file's mistakes, not the user's values.
    config.validate();
    return config;
  } catch (const std::exception& error) {
    throw std::runtime_error(file.path + ": " + error.what());
  }
}

RwkvModel open_model(const std::string& path, at::ScalarType dtype) {
  const WeightFile file = read_weights(path);
  RwkvModel model = empty_model(config_of(file), dtype);
  load_weights(model, file);
  return model;
}

}  // namespace rwkv
