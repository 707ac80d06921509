// Telemetry: what shows that a run goes wrong before its loss does, by layer and head.
//
//   state_norm  Frobenius norm of the wkv state after the last token, of the row where it is
//               largest: of versions whose state is a matrix for each head
//   decay_slow  share of decays, over tokens and channels, within 1e-3 of 1: such a channel forgets
//               nothing in a thousand tokens
//   iclr_low, iclr_high  share of in-context learning rates below 0.01 and above 0.99, where the
//               sigmoid is flat and hardly learns
//   largest logit, over all tokens
// A version without a quantity leaves it out; one without heads counts as a single head.
#pragma once

#include <map>
#include <string>

#include <ATen/core/Tensor.h>

namespace rwkv {

struct TimeMixTelemetry;

struct ModelTelemetry {
  at::Tensor largest_logit;                    // a scalar
  std::map<std::string, at::Tensor> by_layer;  // [L, H], under the names above; fp32 or fp64
};

// The [H] of one layer, from what its TimeMix tells and the wkv state after the last token.
std::map<std::string, at::Tensor> summarise(const TimeMixTelemetry& telemetry,
                                            const at::Tensor& wkv);

}  // namespace rwkv
