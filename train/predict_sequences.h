// Predictions of a model over token sequences of any lengths, several at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/rwkv_model.h"

namespace rwkv {

// Of one sequence: each row of logits predicts the target in the same row.
struct SequencePrediction {
  size_t sequence = 0;   // its index
  at::Tensor logits_TV;  // [T, V], in the weights' dtype
  at::Tensor targets_T;  // [T], int64

  // Cross entropy of each prediction, nats.
  std::vector<float> losses() const;
};

// Feeds every sequence but its last token to the model, from an empty state, and gives each
// sequence's predictions to `visit`: T is one less than its length, which must be 2 or more. Ids
// must be in the model's vocabulary.
// Sequences of like length go together, batch_size at once, filled up at their ends to the longest:
// a prediction sees only what came before it, so neither the filling nor the neighbours change it
// (but for the last bits, where a matrix product of another size rounds otherwise). Hence they are
// visited in order of length, not of index.
// Memory: the logits of a batch, batch_size * longest * V elements.
void predict_sequences(RwkvModel model,
                       std::span<const std::vector<int64_t>> sequences,
                       int64_t batch_size,
                       const std::function<void(const SequencePrediction&)>& visit);

}  // namespace rwkv
