#include "train/machine_rates.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include <ATen/ATen.h>

namespace rwkv {

double matmul_flops_per_s(at::ScalarType dtype) {
  constexpr int64_t kSize = 1024;
  constexpr int kTries = 10;
  const at::NoGradGuard no_grad;
  const at::Tensor x = at::randn({kSize, kSize}).to(dtype);
  const at::Tensor weight = at::randn({kSize, kSize}).to(dtype);
  at::Tensor y = at::empty({kSize, kSize}, dtype);
  double best_s = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kTries; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    at::mm_out(y, x, weight.t());
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    best_s = std::min(best_s, took.count());
  }
  return 2.0 * kSize * kSize * kSize / best_s;
}

}  // namespace rwkv
