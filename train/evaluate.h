// Loss of a model on a corpus, and how it falls with the tokens read before.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "data/binidx.h"
#include "model/rwkv_model.h"

namespace rwkv {

struct EvaluateOptions {
  int64_t ctx_len = 256;                   // tokens predicted from an empty state, then anew
  int64_t batch_size = 8;                  // windows at once
  std::optional<int64_t> max_tokens = {};  // predictions to make; absent: all
  // Of num_shares processes each takes every so manieth window, from that with its number on.
  int64_t share = 0;
  int64_t num_shares = 1;
  // Called now and then with the predictions made so far, if given.
  std::function<void(int64_t num_tokens)> progress = nullptr;
};

// Mean loss of the predictions made after `first` to `last` tokens of their window were read.
struct PositionLoss {
  int64_t first = 1;
  int64_t last = 1;
  int64_t num_tokens = 0;
  double loss = 0;
};

struct Evaluation {
  double loss = 0;         // mean cross entropy, nats a token; 0 without a token
  int64_t num_tokens = 0;  // predictions made; none in a share that is empty
  // After 1 token, 2, 3 to 4, 5 to 8 and so on: a model that uses its context falls from each to
  // the next.
  std::vector<PositionLoss> by_position;
};

// Sums losses up window by window, in fp64.
class LossSum {
 public:
  // Losses of a window in order: the first was made after one token.
  void add(std::span<const float> losses);
  int64_t num_tokens() const;
  Evaluation mean() const;

 private:
  std::vector<double> sums_;     // [range of positions], in Evaluation's order
  std::vector<int64_t> counts_;  // [range of positions]
  int64_t longest_ = 0;          // window so far
};

// Cuts the corpus into windows of ctx_len in file order, each from an empty state, and predicts
// every token but the corpus' first; the last window may be shorter. Windows run across the borders
// of documents, as they do in training.
// Throws std::runtime_error naming file, position and id if an id is beyond the model's vocabulary,
// or if the corpus has fewer than two tokens.
Evaluation evaluate(RwkvModel model, const BinidxFile& corpus, const EvaluateOptions& options);

// Ids [begin, begin + count) of a corpus. Throws std::runtime_error as above for one beyond the
// vocabulary.
std::vector<int64_t> read_ids(const BinidxFile& corpus,
                              int64_t vocab_size,
                              int64_t begin,
                              int64_t count);

}  // namespace rwkv
