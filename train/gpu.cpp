#include "train/gpu.h"

#include <algorithm>
#include <charconv>
#include <fstream>

#include <dlfcn.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

namespace rwkv {
namespace {

constexpr std::string_view kCuda = "cuda";

// CUDA's driver interface, of which nothing is linked; 0 is success everywhere.
class Driver {
 public:
  Driver() : library_(dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {}
  bool is_there() const { return library_ != nullptr; }
  // The error of a function that is missing is one more that is not 0.
  template <typename... Arguments>
  int call(const char* name, Arguments... arguments) const {
    const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(library_, name));
    return function == nullptr ? -1 : function(arguments...);
  }

 private:
  void* library_;
};

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string error_name(const Driver& driver, int error) {
  const char* name = nullptr;
  return driver.call("cuGetErrorName", error, &name) == 0 && name != nullptr
             ? name
             : "error " + std::to_string(error);
}

GpuDevice describe(const Driver& driver, int index) {
  constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // of CUdevice_attribute
  GpuDevice device{.name = "unknown"};
  std::array<char, 128> name{};
  if (driver.call("cuDeviceGetName", name.data(), static_cast<int>(name.size()) - 1, index) == 0) {
    device.name = name.data();
  }
  driver.call("cuDeviceGetAttribute", &device.capability_major, kCapabilityMajor, index);
  driver.call("cuDeviceGetAttribute", &device.capability_minor, kCapabilityMinor, index);
  size_t bytes = 0;
  if (driver.call("cuDeviceTotalMem_v2", &bytes, index) == 0) {
    device.memory_bytes = static_cast<int64_t>(bytes);
  }
  return device;
}

std::string as_version(int cuda_version) {
  return fmt::format("{}.{}", cuda_version / 1000, cuda_version % 1000 / 10);
}

}  // namespace

GpuFacts find_gpus() {
  GpuFacts gpu{.kernel_driver = first_line("/proc/driver/nvidia/version")};
  const Driver driver;
  gpu.has_library = driver.is_there();
  if (!gpu.has_library) {
    return gpu;
  }
  driver.call("cuDriverGetVersion", &gpu.cuda_version);
  int count = 0;
  int error = driver.call("cuInit", 0U);
  if (error == 0) {
    error = driver.call("cuDeviceGetCount", &count);
  }
  if (error != 0) {
    gpu.error = error_name(driver, error);
  }
  for (int index = 0; index < count; ++index) {
    gpu.devices.push_back(describe(driver, index));
  }
  return gpu;
}

bool is_device_name(std::string_view name) {
  if (name == "cpu" || name == kCuda) {
    return true;
  }
  if (!name.starts_with("cuda:")) {
    return false;
  }
  const std::string_view number = name.substr(kCuda.size() + 1);
  int index = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), index);
  return error == std::errc{} && end == number.data() + number.size() && index >= 0;
}

int cuda_index(std::string_view name) {
  int index = 0;
  if (name.size() > kCuda.size()) {
    std::from_chars(name.data() + kCuda.size() + 1, name.data() + name.size(), index);
  }
  return index;
}

std::string why_not_usable(const GpuFacts& gpu, int index) {
  const std::string least = as_version(kLeastCudaVersion);
  if (!gpu.has_library) {
    return "no NVIDIA driver is installed here (libcuda.so.1 cannot be loaded); install one for "
           "CUDA " +
           least + " or newer, or use \"cpu\"";
  }
  if (gpu.cuda_version != 0 && gpu.cuda_version < kLeastCudaVersion) {
    return "the NVIDIA driver here is for CUDA " + as_version(gpu.cuda_version) + ", expected " +
           least + " or newer; update it (580 or newer), or use \"cpu\"";
  }
  if (!gpu.error.empty() || gpu.devices.empty()) {
    return "the NVIDIA driver finds no GPU" + (gpu.error.empty() ? "" : " (" + gpu.error + ")") +
           "; is one there, and may this process or container use it (nvidia-smi)? Or use \"cpu\"";
  }
  if (index >= static_cast<int>(gpu.devices.size())) {
    return fmt::format(
        "there is no GPU {}, only 0 to {}; name one of those", index, gpu.devices.size() - 1);
  }
  const GpuDevice& device = gpu.devices[static_cast<size_t>(index)];
  if (device.capability_major < kLeastCapabilityMajor) {
    return fmt::format(
        "GPU {}, {}, has compute capability {}.{}, expected {}.0 (Ampere) or newer; "
        "use another, or \"cpu\"",
        index,
        device.name,
        device.capability_major,
        device.capability_minor,
        kLeastCapabilityMajor);
  }
  return "";
}

std::string why_no_kernels(const ModelConfig& model) {
  if (model.version == "rwkv4") {
    return "";
  }
  if (model.version != "rwkv7") {
    return "there are no CUDA kernels for " + model.version +
           ", only for rwkv4 and rwkv7; use \"cpu\"";
  }
  if (std::ranges::find(kCudaHeadSizes, model.head_size) == kCudaHeadSizes.end()) {
    return fmt::format(
        "there are no CUDA kernels for model.head_size = {}, only for {}; use one of those, or "
        "\"cpu\"",
        model.head_size,
        fmt::join(kCudaHeadSizes, ", "));
  }
  return "";
}

}  // namespace rwkv
