// The NVIDIA GPUs of this machine, asked of the driver itself: no CUDA library is needed to say
// what is there and why it cannot be used.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/model_config.h"

namespace rwkv {

struct GpuDevice {
  std::string name;
  int capability_major = 0;  // compute capability: 9.0 is Hopper
  int capability_minor = 0;
  int64_t memory_bytes = 0;
};

struct GpuFacts {
  std::string kernel_driver;  // first line of /proc/driver/nvidia/version; empty without one
  bool has_library = false;   // whether libcuda.so.1 can be loaded
  int cuda_version = 0;       // that the driver supports, as 12040 for 12.4
  std::string error = {};     // what the driver said when it could not start; empty if it could
  std::vector<GpuDevice> devices = {};
};

// Nothing throws; takes a second where a GPU sleeps.
GpuFacts find_gpus();

// CUDA that a driver must support, and the oldest GPUs that our kernels are made for.
inline constexpr int kLeastCudaVersion = 13000;
inline constexpr int kLeastCapabilityMajor = 8;

// Whether `name` is "cpu", "cuda" or "cuda:N".
bool is_device_name(std::string_view name);
// N of "cuda:N", 0 of "cuda".
int cuda_index(std::string_view name);

// Why GPU `index` cannot be trained on and what to do about it, as a sentence; empty if it can.
std::string why_not_usable(const GpuFacts& gpu, int index);

// Channels of a head that RWKV-7's CUDA kernels are for.
inline constexpr std::array<int64_t, 3> kCudaHeadSizes{32, 64, 128};

// Why CUDA kernels cannot compute a model, whose configuration is resolved, and what to do about
// it; empty if they can. Needs no GPU.
std::string why_no_kernels(const ModelConfig& model);

}  // namespace rwkv
