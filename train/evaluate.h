// Validation loss of a model on a corpus.
#pragma once

#include <cstdint>
#include <optional>

#include "data/binidx.h"
#include "model/rwkv_model.h"

namespace rwkv {

struct EvaluateOptions {
  int64_t ctx_len = 256;                   // tokens predicted from an empty state, then anew
  int64_t batch_size = 8;                  // windows at once
  std::optional<int64_t> max_tokens = {};  // predictions to make; absent: all
};

struct Evaluation {
  double loss = 0;         // mean cross entropy, nats a token
  int64_t num_tokens = 0;  // predictions made
};

// Cuts the corpus into windows of ctx_len in file order, each from an empty state, and predicts
// every token but the corpus' first; the last window may be shorter. The sum is in fp64.
// Throws std::runtime_error naming file, position and id if an id is beyond the model's vocabulary,
// or if the corpus has fewer than two tokens.
Evaluation evaluate(RwkvModel model, const BinidxFile& corpus, const EvaluateOptions& options);

}  // namespace rwkv
