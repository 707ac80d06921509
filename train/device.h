// The device that a program computes on, by its name: "cpu", "cuda" or "cuda:1".
#pragma once

#include <string>

#include <ATen/core/Tensor.h>

#include "model/ops/device_runtime.h"
#include "model/rwkv_model.h"

namespace rwkv {

struct OpenDevice {
  at::Device device = at::kCPU;
  ops::DeviceRuntime* runtime = nullptr;  // null for the CPU; lives as long as the program
};

// Loads what the device needs: for CUDA librookery_cuda.so, which lies beside this library, and
// with it LibTorch's CUDA half. Throws std::runtime_error, a sentence that starts with `asked_as`
// (such as "--device cuda") and says what to do, if the driver, a GPU or the library is missing or
// too old. One CUDA device a process.
OpenDevice open_device(const std::string& name, const std::string& asked_as);

// Throws std::invalid_argument if the device's ops are not for a model of that version or size.
void move_to_device(RwkvModel& model, const OpenDevice& device);

}  // namespace rwkv
