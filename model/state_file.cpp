#include "model/state_file.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>

#include <ATen/ATen.h>

#include "model/formats/checks.h"
#include "model/formats/format_registry.h"
#include "model/formats/state_tensors.h"
#include "model/weights.h"

namespace rwkv {
namespace {

// A layer's tensors under their names in our files.
template <typename Visit>
void for_each_tensor(int64_t layer, LayerState& state, const Visit& visit) {
  const std::string block = "blocks." + std::to_string(layer);
  visit(block + ".att.shift", state.att_shift_BC);
  visit(block + ".ffn.shift", state.ffn_shift_BC);
  visit(block + ".att.wkv", state.wkv);
}

void check_version(const WeightFile& file, const ModelConfig& config) {
  const std::string& version = version_of_state(file);
  if (version != config.version) {
    throw std::runtime_error(file.path + ": is a state of " + in_quotes(version) +
                             ", expected one of the model's version, \"" + config.version +
                             "\"; make it with this model");
  }
}

void check_layers(const WeightFile& file, size_t tensors_a_layer, const ModelConfig& config) {
  const auto expected = tensors_a_layer * static_cast<size_t>(config.n_layer);
  if (file.tensors.size() != expected) {
    throw std::runtime_error(file.path + ": holds " + std::to_string(file.tensors.size()) +
                             " tensors of a state, expected " + std::to_string(expected) +
                             " for the model's n_layer = " + std::to_string(config.n_layer) +
                             "; is it of a model of another depth?");
  }
}

// The file's tensor with a batch axis in front, of the shape that the model asks for.
at::Tensor load_row(const WeightFile& file,
                    const std::string& name,
                    at::IntArrayRef expected,
                    const ModelConfig& config) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) {
    throw std::runtime_error(file.path + ": " + name + " is missing; the state is not whole");
  }
  if (!at::isFloatingType(to_scalar_type(stored->dtype))) {
    throw std::runtime_error(file.path + ": " + name + " has elements of type " +
                             std::string(name_of(stored->dtype)) + ", expected a float type");
  }
  if (at::IntArrayRef(stored->shape) != expected.slice(1)) {
    throw std::runtime_error(
        file.path + ": " + name + " is " + shape_text(stored->shape) + ", expected " +
        shape_text(std::span(expected).subspan(1)) + " for the model's version " + config.version +
        ", n_embd = " + std::to_string(config.n_embd) +
        ", head_size = " + std::to_string(config.head_size) + "; make it with this model");
  }
  at::Tensor tensor = to_tensor(*stored).unsqueeze(0);
  if (!at::isfinite(tensor).all().item<bool>()) {
    throw std::runtime_error(file.path + ": " + name +
                             " has values that are not finite; make the state again");
  }
  return tensor;
}

StateSizes sizes_of_state(const RwkvModel& model) {
  const ModelConfig& config = model->config();
  return {.version = config.version,
          .n_layer = config.n_layer,
          .n_embd = config.n_embd,
          .wkv_shape = model->initial_state(1).layers[0].wkv.sizes().slice(1).vec()};
}

}  // namespace

State load_state(const std::string& path, const RwkvModel& model) {
  const ModelConfig& config = model->config();
  const WeightFile file =
      is_state_buffer(path) ? read_state_buffer(path, sizes_of_state(model)) : read_weights(path);
  State state = model->initial_state(1);
  const StateKind kind = state_kind(file);
  if (kind == StateKind::kOwn) {
    check_version(file, config);
    check_layers(file, 3, config);
    for (int64_t layer = 0; layer < config.n_layer; ++layer) {
      for_each_tensor(layer,
                      state.layers[static_cast<size_t>(layer)],
                      [&](const std::string& name, at::Tensor& tensor) {
                        tensor = load_row(file, name, tensor.sizes(), config);
                      });
    }
  } else if (kind == StateKind::kTimeState) {
    if (state.layers[0].wkv.dim() != 4) {
      throw std::runtime_error(path + ": holds RWKV-LM's time_state, a matrix for each head, but " +
                               config.version + " has no heads; use a state of this model");
    }
    check_layers(file, 1, config);
    for (int64_t layer = 0; layer < config.n_layer; ++layer) {
      at::Tensor& wkv = state.layers[static_cast<size_t>(layer)].wkv;
      const std::string name = "blocks." + std::to_string(layer) + ".att.time_state";
      // Theirs is [value, key], ours [key, value]; both are N.
      wkv = load_row(file, name, wkv.sizes(), config).transpose(2, 3).contiguous();
    }
  } else {
    throw std::runtime_error(path +
                             ": holds no state, expected tensors blocks.0.att.wkv, ... or "
                             "blocks.0.att.time_state, ... and no others; rookery generate "
                             "--save-state writes one");
  }
  return state;
}

void save_state(const std::string& path, const State& state, const RwkvModel& model) {
  check_state_path(path);
  const bool is_buffer = is_state_buffer(path);
  const ModelConfig& config = model->config();
  NamedTensors tensors;
  for (int64_t layer = 0; layer < config.n_layer; ++layer) {
    LayerState of_layer = state.layers.at(static_cast<size_t>(layer));
    for_each_tensor(layer, of_layer, [&](const std::string& name, const at::Tensor& tensor) {
      TORCH_CHECK(tensor.size(0) == 1, name, " is ", tensor.sizes(), ", expected one batch row");
      if (!at::isfinite(tensor).all().item<bool>()) {
        throw std::runtime_error(path + ": " + name +
                                 " of the state has values that are not finite, so nothing was "
                                 "written; rookery inspect shows whether the model's weights are");
      }
      // A buffer's numbers are fp32, which has every bf16.
      tensors.emplace_back(name,
                           tensor.detach()
                               .squeeze(0)
                               .to(at::kCPU, is_buffer ? at::kFloat : tensor.scalar_type())
                               .contiguous());
    });
  }
  if (is_buffer) {
    write_state_buffer(path, to_write(tensors), sizes_of_state(model));
    return;
  }
  std::map<std::string, std::string> metadata = {{kStateVersion, config.version},
                                                 {kStateLayers, std::to_string(config.n_layer)},
                                                 {kStateEmbd, std::to_string(config.n_embd)}};
  if (config.head_size > 0) {
    metadata[kStateHeadSize] = std::to_string(config.head_size);
  }
  write_weights(path, to_write(tensors), metadata);
}

void check_state_path(const std::string& path) {
  if (is_state_buffer(path)) {
    return;
  }
  check_weights_path(path);
  if (std::filesystem::path(path).extension() == ".pth") {
    throw std::invalid_argument(path +
                                ": a .pth has no place for what says of which version a state is; "
                                "name a .safetensors, of which rookery convert makes RWKV-LM's "
                                "time_state");
  }
}

}  // namespace rwkv
