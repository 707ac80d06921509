#include "train/doctor.h"

#include <iostream>
#include <stdexcept>

#include "train/commands/commands.h"
#include "train/run_main.h"
#include "train/torch_library.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery doctor";

LibTorchFacts find_libtorch() {
  try {
    const std::string version = libtorch_version();
    return {.version = version, .path = loaded_library("libtorch_cpu.so"), .error = ""};
  } catch (const std::runtime_error& error) {
    return {.version = "", .path = "", .error = error.what()};
  }
}

}  // namespace

int doctor_command(int argc, char** argv) {
  cxxopts::Options options(
      "rookery doctor",
      "Looks at the machine: can it train, how well, and what to do about what\n"
      "is wrong. Ends with 0 if training can run, else with 1. Writes 64 MB into\n"
      "the current folder for a moment, to see how fast that is.\n");
  options.add_options()("json", "all of it as JSON");
  const auto parsed = parse_options(options, argc, argv, kExample, {});
  if (!parsed) {
    return 0;
  }
  // Loaded first: the address space that it takes is then no longer free.
  const LibTorchFacts libtorch = find_libtorch();
  HealthFacts facts = find_facts(".");
  facts.libtorch = libtorch;
  const std::vector<Check> checks = examine(facts);
  std::cout << (parsed->count("json") > 0 ? checks_as_json(facts, checks) : checks_as_text(checks));
  return can_train(checks) ? 0 : kExitFailed;
}

}  // namespace rwkv
