#include "train/commands/model_options.h"

#include <stdexcept>

#include "model/state_file.h"
#include "model/weights.h"
#include "train/gpu.h"

namespace rwkv {

void add_device_option(cxxopts::OptionAdder& add) {
  add("device",
      "cpu, cuda, or cuda:N for GPU N",
      cxxopts::value<std::string>()->default_value("cpu"));
}

void add_model_options(cxxopts::OptionAdder& add) {
  add("dtype", "fp32 or bf16", cxxopts::value<std::string>()->default_value("fp32"));
  add("state",
      "a file with the state to start from, by --save-state or RWKV-LM's state tuning, or .bin of "
      "rwkv.cpp's state buffer; default: nothing read yet",
      cxxopts::value<std::string>());
  add_device_option(add);
}

OpenDevice open_device_option(const cxxopts::ParseResult& parsed) {
  const std::string name = parsed["device"].as<std::string>();
  if (!is_device_name(name)) {
    throw std::invalid_argument("--device " + name +
                                ": expected cpu, cuda, or cuda:1 for the second GPU");
  }
  return open_device(name, "--device " + name);
}

RwkvModel open_model_with(const cxxopts::ParseResult& parsed, const std::string& path) {
  const ComputeDtype dtype = parse_dtype(parsed["dtype"].as<std::string>());
  const OpenDevice device = open_device_option(parsed);
  RwkvModel model = open_model(path, dtype == ComputeDtype::kBf16 ? at::kBFloat16 : at::kFloat);
  if (parsed.count("state") > 0) {
    model->set_initial_state(load_state(parsed["state"].as<std::string>(), model));
  }
  move_to_device(model, device);
  return model;
}

}  // namespace rwkv
