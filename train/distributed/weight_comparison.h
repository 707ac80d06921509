// Whether processes that should have the same weights have them.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "model/rwkv_model.h"
#include "train/distributed/communicator.h"

namespace rwkv {

// A number that any change of one weight changes. The same on every device: it is a sum of
// integers.
int64_t weights_fingerprint(RwkvModel model);

// Compares it among all processes. Throws DistributedError naming those that differ from the most.
void require_same_weights(RwkvModel model, Communicator& communicator);

// The sentence about fingerprints by rank; empty if all are the same.
std::string find_drift(std::span<const int64_t> fingerprints);

}  // namespace rwkv
