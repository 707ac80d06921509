#include "train/doctor.h"

#include <iostream>
#include <stdexcept>

#include "train/commands/commands.h"
#include "train/commands/launch.h"
#include "train/run_main.h"
#include "train/torch_library.h"

namespace rwkv {
namespace {

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
  cxxopts::Options options = doctor_options();
  const auto parsed = parse_options(options, argc, argv, kDoctorExample, {});
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
