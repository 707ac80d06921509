// Sampling of tokens from logits.
#pragma once

#include <cstdint>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

namespace rwkv {

struct SamplingOptions {
  double temperature = 1.0;  // 0 or more; 0 takes the most likely token
  double top_p = 1.0;        // (0, 1]: the smallest set of tokens with this probability in all
  int64_t top_k = 0;         // 0 or more: at most this many tokens; 0 for all

  // Throws std::invalid_argument naming the option and its range.
  void validate() const;
};

// Draws a token from logits_V [V]. Throws std::runtime_error if they are not finite. Filters act in
// the order top_k, top_p, temperature: RWKV's demos cut the distribution first and flatten what is
// left.
int64_t sample_token(const at::Tensor& logits_V,
                     const SamplingOptions& options,
                     at::Generator generator);

}  // namespace rwkv
