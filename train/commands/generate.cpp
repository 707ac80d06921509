#include <iostream>
#include <optional>

#include <ATen/ATen.h>

#include "model/formats/format_registry.h"
#include "model/state_file.h"
#include "train/commands/commands.h"
#include "train/commands/model_options.h"
#include "train/generate_text.h"
#include "train/model_tokenizer.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery generate --model runs/mine --prompt \"In the beginning\" --length 100";

}  // namespace

int generate_command(int argc, char** argv) {
  cxxopts::Options options("rookery generate",
                           "Continues a prompt in RNN mode: constant time and memory a token.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("model",
      "a run, a checkpoint folder, a .pth or .safetensors file",
      cxxopts::value<std::string>());
  add("tokenizer", "default: the one the model was trained with", cxxopts::value<std::string>());
  add("prompt",
      "text to continue; none starts a document",
      cxxopts::value<std::string>()->default_value(""));
  add("length", "tokens to generate", cxxopts::value<int64_t>()->default_value("100"));
  add("temperature",
      "0 takes the most likely token",
      cxxopts::value<double>()->default_value("1.0"));
  add("top-p",
      "sample from the likeliest tokens with this probability in all",
      cxxopts::value<double>()->default_value("0.9"));
  add("top-k", "and from this many at most; 0: all", cxxopts::value<int64_t>()->default_value("0"));
  add("seed", "the same seed gives the same text", cxxopts::value<uint64_t>()->default_value("1"));
  add("save-state",
      "a .safetensors, or a .bin as rwkv.cpp has it, for the state after the text, to go on from "
      "with --state",
      cxxopts::value<std::string>());
  add_model_options(add);
  const auto parsed = parse_options(options, argc, argv, kExample, {"model"});
  if (!parsed) {
    return 0;
  }
  const SamplingOptions sampling{.temperature = (*parsed)["temperature"].as<double>(),
                                 .top_p = (*parsed)["top-p"].as<double>(),
                                 .top_k = (*parsed)["top-k"].as<int64_t>()};
  sampling.validate();
  const int64_t length = (*parsed)["length"].as<int64_t>();
  if (length < 0) {
    throw std::invalid_argument("--length " + std::to_string(length) + ": must be 0 or more");
  }
  if (parsed->count("save-state") > 0) {
    check_state_path((*parsed)["save-state"].as<std::string>());
  }
  const std::string path = find_model((*parsed)["model"].as<std::string>(), Scrutiny::kWeights);
  const auto spec = parsed->count("tokenizer") > 0
                        ? std::optional((*parsed)["tokenizer"].as<std::string>())
                        : std::nullopt;
  const auto tokenizer = open_tokenizer_of(read_weights(path), spec);
  const RwkvModel model = open_model_with(*parsed, path);

  const std::string prompt = (*parsed)["prompt"].as<std::string>();
  bool begun = false;
  const State state = generate_text(model,
                                    *tokenizer,
                                    {.prompt = prompt,
                                     .length = length,
                                     .sampling = sampling,
                                     .seed = (*parsed)["seed"].as<uint64_t>(),
                                     .continues = given_state(*parsed).has_value()},
                                    [&](std::string_view text) {
                                      // Only now: a prompt that cannot be continued leaves no half
                                      // result.
                                      std::cout << (begun ? "" : prompt) << text << std::flush;
                                      begun = true;
                                    });
  std::cout << (begun ? "" : prompt);
  std::cout << '\n';
  if (parsed->count("save-state") > 0) {
    save_state((*parsed)["save-state"].as<std::string>(), state, model);
  }
  return 0;
}

}  // namespace rwkv
