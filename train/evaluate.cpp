#include "train/evaluate.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <string>

#include "train/predict_sequences.h"

namespace rwkv {
namespace {

// Ranges of positions end at powers of two: 1, 2, 4, 8 ...
size_t range_of(uint64_t position) {
  return static_cast<size_t>(std::bit_width(position - 1));
}

int64_t last_of(size_t range) {
  return int64_t{1} << range;
}

}  // namespace

void LossSum::add(std::span<const float> losses) {
  const size_t num_ranges = losses.empty() ? 0 : range_of(losses.size()) + 1;
  if (num_ranges > sums_.size()) {
    sums_.resize(num_ranges);
    counts_.resize(num_ranges);
  }
  for (size_t i = 0; i < losses.size(); ++i) {
    const size_t range = range_of(i + 1);
    sums_[range] += static_cast<double>(losses[i]);
    ++counts_[range];
  }
  longest_ = std::max(longest_, static_cast<int64_t>(losses.size()));
}

int64_t LossSum::num_tokens() const {
  return std::accumulate(counts_.begin(), counts_.end(), int64_t{0});
}

Evaluation LossSum::mean() const {
  Evaluation mean{.num_tokens = num_tokens(), .by_position = {}};
  for (size_t range = 0; range < sums_.size(); ++range) {
    mean.by_position.push_back({.first = range == 0 ? 1 : last_of(range - 1) + 1,
                                .last = std::min(last_of(range), longest_),
                                .num_tokens = counts_[range],
                                .loss = sums_[range] / static_cast<double>(counts_[range])});
  }
  mean.loss = std::accumulate(sums_.begin(), sums_.end(), 0.0) /
              static_cast<double>(std::max<int64_t>(mean.num_tokens, 1));
  return mean;
}

std::vector<int64_t> read_ids(const BinidxFile& corpus,
                              int64_t vocab_size,
                              int64_t begin,
                              int64_t count) {
  std::vector<int64_t> ids(static_cast<size_t>(count));
  corpus.read(begin, ids);
  require_ids_below(vocab_size, corpus, begin, ids);
  return ids;
}

Evaluation evaluate(RwkvModel model, const BinidxFile& corpus, const EvaluateOptions& options) {
  const int64_t predictions =
      std::min(corpus.num_tokens() - 1, options.max_tokens.value_or(corpus.num_tokens() - 1));
  if (predictions < 1) {
    throw std::runtime_error(corpus.prefix() + ".bin: holds " +
                             std::to_string(corpus.num_tokens()) +
                             " tokens, expected at least 2 to predict one");
  }
  LossSum sum;
  std::vector<std::vector<int64_t>> windows;
  const int64_t stride = options.num_shares * options.ctx_len;
  for (int64_t begin = options.share * options.ctx_len; begin < predictions;) {
    windows.clear();
    for (; begin < predictions && std::ssize(windows) < options.batch_size; begin += stride) {
      const int64_t len = std::min(options.ctx_len, predictions - begin);
      windows.push_back(read_ids(corpus, model->config().vocab_size, begin, len + 1));
    }
    predict_sequences(model, windows, options.batch_size, [&](const SequencePrediction& window) {
      sum.add(window.losses());
    });
    if (options.progress) {
      options.progress(sum.num_tokens());
    }
  }
  return sum.mean();
}

}  // namespace rwkv
