// The table from a version's name to what makes its model: one row a version.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include "model/block.h"
#include "model/model_config.h"

namespace rwkv {

// How the trainer treats a parameter.
struct ParameterTraits {
  double lr_scale = 1.0;      // factor on the learning rate, with layer-wise rates on
  bool weight_decay = false;  // whether weight decay applies
  bool keep_fp32 = false;     // stays fp32 in a bf16 model
};

struct ModelVersion {
  std::string_view name;  // that of its row in model/version_shapes.h

  std::shared_ptr<TimeMix> (*make_time_mix)(const ModelConfig& config, int64_t layer);
  std::shared_ptr<ChannelMix> (*make_channel_mix)(const ModelConfig& config, int64_t layer);
  // wkv state before any token; options give dtype and device.
  at::Tensor (*initial_wkv)(const ModelConfig& config,
                            int64_t batch_size,
                            const at::TensorOptions& options);
  // Writes the author's initial value of the parameter `name` into `parameter` (fp32).
  void (*initialise)(const ModelConfig& config,
                     std::string_view name,
                     at::Tensor& parameter,
                     double emb_range,
                     at::Generator generator);
  ParameterTraits (*traits)(std::string_view name, at::IntArrayRef shape);
};

// Throws std::invalid_argument listing the known names.
const ModelVersion& find_version(std::string_view name);

}  // namespace rwkv
