#include "train/commands/model_options.h"

#include <filesystem>
#include <stdexcept>

#include <spdlog/spdlog.h>

#include "data/content_hash.h"
#include "data/mapped_file.h"
#include "model/formats/format_registry.h"
#include "model/state_file.h"
#include "model/weights.h"
#include "train/checkpoint.h"
#include "train/gpu.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kNoState = "none";

// Weights learnt with every sequence starting from a state say little from another start.
void start_as_in_its_run(RwkvModel& model, const std::string& path) {
  const auto config = config_in(read_weights(path));
  if (!config || !config->init.state) {
    return;
  }
  const std::string& state = *config->init.state;
  const std::string begun =
      path + ": its run began every sequence from the state in " + state + " (init.state), ";
  constexpr const char* kAdvice =
      "; name the file with --state, or begin from nothing with --state none";
  if (!std::filesystem::exists(state)) {
    throw std::runtime_error(begun + "which is not there" + kAdvice);
  }
  // Only a checkpoint says what was in it, not weights that were converted.
  if (std::filesystem::exists(std::filesystem::path(path) / "trainer.json")) {
    const std::string saved = read_saved_run(path).state.initial_state;
    const std::string now = content_hash(MappedFile(state).bytes());
    if (now != saved) {
      throw std::runtime_error(begun + "then with the checksum " + saved + ", now with " + now +
                               kAdvice);
    }
  }
  model->set_initial_state(load_state(state, model));
  spdlog::info("every sequence begins from the state in {}, as in the model's run", state);
}

}  // namespace

void add_device_option(cxxopts::OptionAdder& add) {
  add("device",
      "cpu, cuda, or cuda:N for GPU N",
      cxxopts::value<std::string>()->default_value("cpu"));
}

void add_model_options(cxxopts::OptionAdder& add) {
  add("dtype", "fp32 or bf16", cxxopts::value<std::string>()->default_value("fp32"));
  add("state",
      "a file with the state to start from, by --save-state, RWKV-LM's state tuning or (.bin) "
      "rwkv.cpp; none: nothing read yet; default: init.state of the model's run, else none",
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

std::optional<std::string> given_state(const cxxopts::ParseResult& parsed) {
  const auto state =
      parsed.count("state") > 0 ? std::optional(parsed["state"].as<std::string>()) : std::nullopt;
  return state == kNoState ? std::nullopt : state;
}

RwkvModel open_model_with(const cxxopts::ParseResult& parsed, const std::string& path) {
  const ComputeDtype dtype = parse_dtype(parsed["dtype"].as<std::string>());
  const OpenDevice device = open_device_option(parsed);
  RwkvModel model = open_model(path, dtype == ComputeDtype::kBf16 ? at::kBFloat16 : at::kFloat);
  if (const auto state = given_state(parsed)) {
    model->set_initial_state(load_state(*state, model));
  } else if (parsed.count("state") == 0) {
    start_as_in_its_run(model, path);
  }
  move_to_device(model, device);
  return model;
}

}  // namespace rwkv
