#include "train/torch_library.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <stdexcept>

#include <dlfcn.h>

#include "train/run_main.h"

namespace rwkv {
namespace {

using RunTorchCommand = int (*)(const char* name, int argc, char** argv, bool verbose);

using LibTorchVersion = const char* (*)();

// What a library's initialisers throw does not come out of dlopen, it ends the program. LibTorch's
// throw where memory is short.
[[noreturn]] void fail_to_load() {
  std::fputs(
      "rookery: LibTorch cannot be loaded: its start failed; is memory short, or limited by "
      "ulimit -v?\n",
      stderr);
  std::_Exit(kExitFailed);
}

// A function of the library, which is loaded at the first call.
void* load_function(const char* name) {
  const std::string path = torch_library_path();
  // Global: a kernel library loaded later finds LibTorch's dispatcher, not a second one.
  const std::terminate_handler usual = std::set_terminate(&fail_to_load);
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  std::set_terminate(usual);
  void* entry = library == nullptr ? nullptr : dlsym(library, name);
  if (entry == nullptr) {
    throw std::runtime_error(path + ": cannot be loaded: " + dlerror() +
                             "; build again, or copy bin and lib of an installation together");
  }
  return entry;
}

}  // namespace

std::string torch_library_path() {
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe");
  return (program.parent_path().parent_path() / "lib" / "librookery_torch.so").string();
}

int run_torch_command(const char* name, int argc, char** argv, bool verbose) {
  static const auto entry =
      reinterpret_cast<RunTorchCommand>(load_function("rookery_run_torch_command"));
  return entry(name, argc, argv, verbose);
}

std::string libtorch_version() {
  return reinterpret_cast<LibTorchVersion>(load_function("rookery_libtorch_version"))();
}

}  // namespace rwkv
