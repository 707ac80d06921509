#include "train/machine_rates.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <limits>

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// Well beyond the last-level cache.
constexpr int64_t kStreamFloats = int64_t{1} << 26;

// The best of a few tries: what disturbs one makes it slower, never faster.
double best_seconds(int tries, const std::function<void()>& work) {
  const at::NoGradGuard no_grad;
  work();
  double best_s = std::numeric_limits<double>::infinity();
  for (int i = 0; i < tries; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best_s = std::min(best_s, took.count());
  }
  return best_s;
}

}  // namespace

double matmul_flops_per_s(at::ScalarType dtype) {
  constexpr int64_t kSize = 1024;
  const at::Tensor x = at::randn({kSize, kSize}).to(dtype);
  const at::Tensor weight = at::randn({kSize, kSize}).to(dtype);
  at::Tensor y = at::empty({kSize, kSize}, dtype);
  return 2.0 * kSize * kSize * kSize / best_seconds(12, [&] { at::mm_out(y, x, weight.t()); });
}

double update_bytes_per_s() {
  const at::Tensor numbers = at::zeros({kStreamFloats});
  return 2.0 * sizeof(float) * kStreamFloats / best_seconds(7, [&] { numbers.add_(1); });
}

double read_bytes_per_s() {
  return read_bytes_per_s(kStreamFloats * int64_t{sizeof(float)});
}

double read_bytes_per_s(int64_t bytes) {
  const at::Tensor from = at::ones({std::max<int64_t>(bytes / int64_t{sizeof(float)}, 1)});
  return static_cast<double>(from.nbytes()) / best_seconds(7, [&] { from.sum(); });
}

}  // namespace rwkv
