// A timeline of work: what the host does, which ops it runs, and what a GPU does meanwhile.
#pragma once

#include <functional>
#include <string>

#include <ATen/core/Tensor.h>

namespace rwkv {

// Runs `work`, which ends when the device does, and writes its timeline to `path` in the Trace
// Event Format that chrome://tracing and ui.perfetto.dev open: LibTorch's ops, and on a GPU every
// call of CUDA's runtime, kernel and copy. Recording makes `work` a little slower. Throws
// std::runtime_error naming the path if it cannot be written.
void write_trace(const std::string& path, at::Device device, const std::function<void()>& work);

}  // namespace rwkv
