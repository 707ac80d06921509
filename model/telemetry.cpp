#include "model/telemetry.h"

#include <ATen/ATen.h>

#include "model/block.h"

namespace rwkv {
namespace {

constexpr double kSlow = 1e-3, kLow = 0.01, kHigh = 0.99;

// Share of the true ones, head by head: [.., C] to [H].
at::Tensor share(const at::Tensor& is_C, int64_t n_head) {
  return is_C.reshape({-1, n_head, is_C.size(-1) / n_head})
      .to(at::kFloat)
      .mean(at::IntArrayRef({0, 2}));
}

}  // namespace

std::map<std::string, at::Tensor> summarise(const TimeMixTelemetry& telemetry,
                                            const at::Tensor& wkv) {
  const bool has_heads = wkv.dim() == 4;
  const int64_t n_head = has_heads ? wkv.size(1) : 1;
  std::map<std::string, at::Tensor> result;
  if (has_heads) {
    result["state_norm"] = at::linalg_vector_norm(wkv, 2, at::IntArrayRef({2, 3})).amax(0);
  }
  if (telemetry.w_decay.defined()) {
    result["decay_slow"] = share(1 - telemetry.w_decay < kSlow, n_head);
  }
  if (telemetry.iclr_BTC.defined()) {
    result["iclr_low"] = share(telemetry.iclr_BTC < kLow, n_head);
    result["iclr_high"] = share(telemetry.iclr_BTC > kHigh, n_head);
  }
  return result;
}

}  // namespace rwkv
