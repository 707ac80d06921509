#include "train/commands/torch_commands.h"

#include <stdexcept>
#include <string>
#include <string_view>

#include <c10/util/Exception.h>
#include <torch/csrc/api/include/torch/version.h>

#include "data/mapping_guard.h"
#include "train/commands/commands.h"
#include "train/cpu_allocator.h"
#include "train/run_main.h"

namespace rwkv {
namespace {

struct TorchCommand {
  std::string_view name;
  int (*run)(int argc, char** argv);
};

constexpr TorchCommand kTorchCommands[] = {
    {"train", &train_command},
    {"eval", &eval_command},
    {"generate", &generate_command},
    {"logits", &logits_command},
    {"doctor", &doctor_links_command},
};

int run(std::string_view name, int argc, char** argv, bool verbose) {
  if (name == "bench") {
    return bench_command(argc, argv, verbose);
  }
  for (const TorchCommand& command : kTorchCommands) {
    if (command.name == name) {
      return command.run(argc, argv);
    }
  }
  throw BugError("librookery_torch.so has no command " + std::string(name));
}

std::string text_of(const c10::Error& error, bool verbose) {
  return verbose ? error.what() : error.what_without_backtrace();
}

}  // namespace
}  // namespace rwkv

// LibTorch's exceptions end here: the program that loads this library does not know their types.
extern "C" int rookery_run_torch_command(const char* name, int argc, char** argv, bool verbose) {
  using rwkv::BugError;
  // This library has its own copy of what the program and it both need, mappings among it.
  rwkv::report_shrunk_mappings();
  rwkv::keep_cpu_memory();
  try {
    return rwkv::run(name, argc, argv, verbose);
  } catch (const c10::OutOfMemoryError& error) {
    throw rwkv::OutOfMemory(rwkv::text_of(error, verbose));
  } catch (const c10::Error& error) {
    const std::string text = rwkv::text_of(error, verbose);
    // The CPU allocator reports exhaustion as a plain error.
    if (text.find("DefaultCPUAllocator") != std::string::npos) {
      throw rwkv::OutOfMemory(text);
    }
    throw BugError(text);
  }
}

extern "C" const char* rookery_libtorch_version() {
  return TORCH_VERSION;
}
