#include "model/generate.h"

#include <stdexcept>
#include <string>

#include <ATen/ATen.h>

namespace rwkv {

void SamplingOptions::validate() const {
  if (!(temperature >= 0)) {
    throw std::invalid_argument("temperature = " + std::to_string(temperature) +
                                ": must be 0 or more");
  }
  if (!(top_p > 0 && top_p <= 1)) {
    throw std::invalid_argument("top_p = " + std::to_string(top_p) + ": must be in (0, 1]");
  }
  if (top_k < 0) {
    throw std::invalid_argument("top_k = " + std::to_string(top_k) + ": must be 0 or more");
  }
}

int64_t sample_token(const at::Tensor& logits_V,
                     const SamplingOptions& options,
                     at::Generator generator) {
  const at::NoGradGuard no_grad;
  if (!logits_V.isfinite().all().item<bool>()) {
    throw std::runtime_error(
        "the model's logits are not finite, so no token can be drawn; rookery inspect names "
        "tensors "
        "with values that are not finite");
  }
  if (options.temperature == 0) {
    return logits_V.argmax().item<int64_t>();
  }
  auto [probs_V, order_V] = at::softmax(logits_V.to(at::kFloat), 0).sort(0, true);
  int64_t kept = options.top_k > 0 ? std::min(options.top_k, probs_V.size(0)) : probs_V.size(0);
  if (options.top_p < 1) {
    // The first token that reaches top_p stays.
    const at::Tensor before_V = probs_V.cumsum(0) - probs_V;
    kept = std::min(kept, (before_V < options.top_p).sum().item<int64_t>());
  }
  // Over the most likely one's: at a low temperature all of them could underflow.
  const at::Tensor weights =
      (probs_V.slice(0, 0, std::max<int64_t>(kept, 1)) / probs_V[0]).pow(1.0 / options.temperature);
  const int64_t drawn = at::multinomial(weights, 1, false, generator).item<int64_t>();
  return order_V[drawn].item<int64_t>();
}

}  // namespace rwkv
