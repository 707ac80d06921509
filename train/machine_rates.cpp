#include "train/machine_rates.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// Well beyond the last-level cache; a GPU needs more to be busy for a while.
int64_t stream_floats(const ops::DeviceRuntime* runtime) {
  return runtime == nullptr ? int64_t{1} << 26 : int64_t{1} << 28;
}

at::TensorOptions options_of(const ops::DeviceRuntime* runtime) {
  return at::TensorOptions(at::kFloat).device(runtime == nullptr ? at::kCPU : runtime->device());
}

double seconds_of(const std::function<void()>& work, ops::DeviceRuntime* runtime) {
  if (runtime != nullptr) {
    return runtime->milliseconds_of(work) / 1000;
  }
  const auto begin = std::chrono::steady_clock::now();
  work();
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  return took.count();
}

// The best of a few tries: what disturbs one makes it slower, never faster.
double best_seconds(int tries, ops::DeviceRuntime* runtime, const std::function<void()>& work) {
  const at::NoGradGuard no_grad;
  work();
  double best_s = std::numeric_limits<double>::infinity();
  for (int i = 0; i < tries; ++i) {
    best_s = std::min(best_s, seconds_of(work, runtime));
  }
  return best_s;
}

}  // namespace

double matmul_flops_per_s(at::ScalarType dtype, ops::DeviceRuntime* runtime) {
  const int64_t size = runtime == nullptr ? 1024 : 8192;
  const at::TensorOptions options = options_of(runtime);
  const at::Tensor x = at::randn({size, size}, options).to(dtype);
  const at::Tensor weight = at::randn({size, size}, options).to(dtype);
  at::Tensor y = at::empty({size, size}, options.dtype(dtype));
  const double flops = 2.0 * static_cast<double>(size * size * size);
  return flops / best_seconds(12, runtime, [&] { at::mm_out(y, x, weight.t()); });
}

double update_bytes_per_s(ops::DeviceRuntime* runtime) {
  const at::Tensor numbers = at::zeros({stream_floats(runtime)}, options_of(runtime));
  return 2.0 * static_cast<double>(numbers.nbytes()) /
         best_seconds(7, runtime, [&] { numbers.add_(1); });
}

double copy_bytes_per_s(ops::DeviceRuntime* runtime) {
  const at::Tensor from = at::zeros({stream_floats(runtime)}, options_of(runtime));
  const at::Tensor to = at::empty_like(from);
  return 2.0 * static_cast<double>(from.nbytes()) /
         best_seconds(7, runtime, [&] { to.copy_(from); });
}

double read_bytes_per_s(ops::DeviceRuntime* runtime) {
  return read_bytes_per_s(stream_floats(runtime) * int64_t{sizeof(float)}, runtime);
}

double read_bytes_per_s(int64_t bytes, ops::DeviceRuntime* runtime) {
  const at::Tensor from =
      at::ones({std::max<int64_t>(bytes / int64_t{sizeof(float)}, 1)}, options_of(runtime));
  return static_cast<double>(from.nbytes()) / best_seconds(7, runtime, [&] { from.sum(); });
}

}  // namespace rwkv
