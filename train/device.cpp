#include "train/device.h"

#include <filesystem>
#include <stdexcept>

#include <dlfcn.h>

#include "train/gpu.h"

namespace rwkv {
namespace {

using CudaRuntime = ops::DeviceRuntime* (*)(int index);

// Beside the library, or the program of tests' folder, that this code is in.
std::string cuda_library_path() {
  Dl_info info{};
  dladdr(reinterpret_cast<void*>(&cuda_library_path), &info);
  const std::filesystem::path here = std::filesystem::absolute(info.dli_fname).parent_path();
  return (here.parent_path() / "lib" / "librookery_cuda.so").string();
}

CudaRuntime load_cuda_library() {
  const std::string path = cuda_library_path();
  if (!std::filesystem::exists(path)) {
    throw std::runtime_error(path +
                             " is not there: this rookery was built without CUDA; build it with "
                             "-DROOKERY_CUDA=ON (scripts/setup.sh --cuda), or use \"cpu\"");
  }
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* entry = library == nullptr ? nullptr : dlsym(library, "rookery_cuda_runtime");
  if (entry == nullptr) {
    throw std::runtime_error(std::string("the CUDA library cannot be loaded: ") + dlerror() +
                             "; scripts/setup.sh --cuda installs what LibTorch's CUDA half needs");
  }
  return reinterpret_cast<CudaRuntime>(entry);
}

}  // namespace

OpenDevice open_device(const std::string& name, const std::string& asked_as) {
  if (name == "cpu") {
    return {};
  }
  const int index = cuda_index(name);
  if (const std::string reason = why_not_usable(find_gpus(), index); !reason.empty()) {
    throw std::runtime_error(asked_as + ": " + reason);
  }
  try {
    static const CudaRuntime open = load_cuda_library();
    ops::DeviceRuntime* const runtime = open(index);
    return {.device = runtime->device(), .runtime = runtime};
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(asked_as + ": " + error.what());
  }
}

void move_to_device(RwkvModel& model, const OpenDevice& device) {
  if (device.runtime != nullptr) {
    if (const std::string reason = why_no_kernels(model->config()); !reason.empty()) {
      throw std::invalid_argument(device.device.str() + ": " + reason);
    }
  }
  const int64_t n_embd = model->config().n_embd;
  if (device.runtime != nullptr && n_embd > device.runtime->max_channels()) {
    throw std::invalid_argument("n_embd = " + std::to_string(n_embd) + ": the kernels of " +
                                device.device.str() + " take at most " +
                                std::to_string(device.runtime->max_channels()) +
                                "; use a smaller model or the device \"cpu\"");
  }
  model->to(device.device);
}

}  // namespace rwkv
