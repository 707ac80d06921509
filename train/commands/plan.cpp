#include <charconv>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string_view>
#include <vector>

#include "data/atomic_file.h"
#include "data/binidx.h"
#include "model/formats/format_registry.h"
#include "model/version_shapes.h"
#include "train/commands/commands.h"
#include "train/gpu.h"
#include "train/machine.h"
#include "train/model_sizes.h"
#include "train/plan_report.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery plan --config configs/smoke_rwkv4.toml --set model.vocab_size=256 --gpus 8 "
    "--memory 80GB";

// Less is no memory, but a number whose unit was forgotten.
constexpr double kLeastBytes = 1e6;
constexpr double kMostBytes = 1e18;

struct Unit {
  std::string_view name;
  double bytes;
};
constexpr Unit kUnits[] = {{"", 1},
                           {"MB", 1e6},
                           {"GB", 1e9},
                           {"TB", 1e12},
                           {"MiB", 1024.0 * 1024},
                           {"GiB", 1024.0 * 1024 * 1024},
                           {"TiB", 1024.0 * 1024 * 1024 * 1024}};

double parse_memory(const std::string& text) {
  double number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  while (unit.starts_with(' ')) {
    unit.remove_prefix(1);
  }
  for (const Unit& candidate : kUnits) {
    const double bytes = number * candidate.bytes;
    if (error == std::errc() && unit == candidate.name && bytes >= kLeastBytes &&
        bytes <= kMostBytes) {
      return bytes;
    }
  }
  throw std::invalid_argument("--memory " + text +
                              ": expected a size with its unit, such as 80GB, \"80 GiB\" or 80e9");
}

// Beyond that no model is, and to list its tensors would take long and sums of sizes 64 bits.
constexpr int64_t kMostLayers = 10'000;
constexpr double kMostParameters = 1e15;

void require_some_size(const ModelConfig& model) {
  const auto layers = static_cast<double>(model.n_layer);
  const auto C = static_cast<double>(model.n_embd);
  const double width = static_cast<double>(model.dim_att) + static_cast<double>(model.dim_ffn);
  const double parameters =
      layers * C * (4 * width + C) + 2 * C * static_cast<double>(model.vocab_size);
  if (model.n_layer > kMostLayers || parameters > kMostParameters) {
    throw std::invalid_argument("model.n_layer = " + std::to_string(model.n_layer) +
                                ", model.n_embd = " + std::to_string(model.n_embd) +
                                ": a model too large to plan; at most " +
                                std::to_string(kMostLayers) + " layers and 1e15 parameters");
  }
}

// As the trainer finds them (train/run_setup.h), with as much of that as a plan needs.
void resolve_model(RunConfig& config) {
  ModelConfig& model = config.model;
  if (config.init.from) {
    const std::string path = find_model(*config.init.from);
    const TensorShapes shapes = shapes_of(read_weights(path));
    confirm_sizes(config, recognise_version(shapes).config_of(shapes), path);
  }
  const std::string& corpus = config.data.train;
  if (std::filesystem::exists(corpus + ".idx")) {
    resolve_vocab_size(model, BinidxFile(corpus));
  } else if (model.vocab_size == 0) {
    throw std::invalid_argument("model.vocab_size is not given, and data.train = \"" + corpus +
                                "\", whose tokenizer would say it, is not there; add --set "
                                "model.vocab_size=N");
  }
  find_version_shapes(model.version).resolve(model);
  model.validate();
  require_some_size(model);
}

int64_t at_least(const cxxopts::ParseResult& parsed, const std::string& name, int64_t least) {
  const auto number = parsed[name].as<int64_t>();
  if (number < least) {
    throw std::invalid_argument("--" + name + " " + std::to_string(number) + ": must be " +
                                std::to_string(least) + " or more");
  }
  return number;
}

PlanRequest request_of(const cxxopts::ParseResult& parsed) {
  const auto overrides = parsed.count("set") > 0 ? parsed["set"].as<std::vector<std::string>>()
                                                 : std::vector<std::string>{};
  const GpuRates& gpu = find_gpu_rates(parsed["gpu"].as<std::string>());
  PlanRequest request{.config = load_run_config(parsed["config"].as<std::string>(), overrides)};
  const int64_t gpus = parsed.count("gpus") > 0               ? at_least(parsed, "gpus", 0)
                       : request.config.train.device == "cpu" ? 0
                                                              : 1;
  if (gpus > 0) {
    request.gpu = &gpu;
    request.processes = gpus;
  }
  request.memory_bytes = parsed.count("memory") > 0
                             ? parse_memory(parsed["memory"].as<std::string>())
                         : gpus > 0 ? gpu.memory_bytes
                                    : static_cast<double>(describe_machine().memory_bytes);
  resolve_model(request.config);
  if (gpus > 0) {
    if (const std::string reason = why_no_kernels(request.config.model); !reason.empty()) {
      throw std::invalid_argument("--gpus " + std::to_string(gpus) + ": " + reason);
    }
  }
  return request;
}

}  // namespace

int plan_command(int argc, char** argv) {
  cxxopts::Options options(
      "rookery plan",
      "Predicts what a run will hold in memory and how fast it will be, and what\n"
      "would fit. Nothing is allocated, and no GPU is needed.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("config", "the run's TOML file", cxxopts::value<std::string>());
  add("set",
      "section.key=value instead of the file's; may be given several times",
      cxxopts::value<std::vector<std::string>>());
  add("gpus", "how many; 0 is the CPU; default: as train.device says", cxxopts::value<int64_t>());
  add("gpu", "h100, h200 or a100", cxxopts::value<std::string>()->default_value("h100"));
  add("memory",
      "of one GPU, or of the machine: 80GB, \"80 GiB\", 80e9; default: as there is",
      cxxopts::value<std::string>());
  add("json",
      "write the plan as JSON to this file; - prints it instead of the table",
      cxxopts::value<std::string>());
  const auto parsed = parse_options(options, argc, argv, kExample, {"config"});
  if (!parsed) {
    return 0;
  }
  const PlanRequest request = request_of(*parsed);
  const RunPlan plan = plan_run(request);
  const std::string path = parsed->count("json") > 0 ? (*parsed)["json"].as<std::string>() : "";
  std::cout << (path == "-" ? plan_as_json(request, plan) : plan_as_text(request, plan));
  if (!path.empty() && path != "-") {
    AtomicFile file(path);
    file.write(plan_as_json(request, plan));
    file.commit();
  }
  return 0;
}

}  // namespace rwkv
