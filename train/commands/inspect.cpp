#include "train/inspect.h"

#include <iostream>

#include "train/commands/commands.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery inspect runs/mine";

}  // namespace

int inspect_command(int argc, char** argv) {
  cxxopts::Options options("rookery inspect",
                           "Shows what is in PATH: a model (.pth, .safetensors), a run's or a\n"
                           "checkpoint's folder, a corpus, a tokenizer's file or spec, or a\n"
                           "TensorBoard event file. Of tensors: shape, dtype and statistics.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("path", "what to look at", cxxopts::value<std::string>());
  add("json", "all of it as JSON");
  options.parse_positional({"path"});
  options.positional_help("PATH");
  const auto parsed = parse_options(options, argc, argv, kExample, {"path"});
  if (!parsed) {
    return 0;
  }
  const std::string path = (*parsed)["path"].as<std::string>();
  std::cout << (parsed->count("json") > 0 ? inspect_as_json(path) : inspect_as_text(path));
  return 0;
}

}  // namespace rwkv
