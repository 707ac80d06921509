#include "train/evaluate.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "model/loss.h"

namespace rwkv {
namespace {

// Windows [begin + i * len, begin + (i + 1) * len] for i < rows, as [rows, len + 1].
at::Tensor read_windows(
    const BinidxFile& corpus, int64_t vocab_size, int64_t begin, int64_t rows, int64_t len) {
  at::Tensor ids = at::empty({rows, len + 1}, at::kLong);
  auto* data = ids.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < rows; ++row) {
    const std::span<int64_t> window(data + row * (len + 1), static_cast<size_t>(len + 1));
    corpus.read(begin + row * len, window);
    require_ids_below(vocab_size, corpus, begin + row * len, window);
  }
  return ids;
}

}  // namespace

Evaluation evaluate(RwkvModel model, const BinidxFile& corpus, const EvaluateOptions& options) {
  const at::NoGradGuard no_grad;
  const int64_t predictions =
      std::min(corpus.num_tokens() - 1, options.max_tokens.value_or(corpus.num_tokens() - 1));
  if (predictions < 1) {
    throw std::runtime_error(corpus.prefix() + ".bin: holds " +
                             std::to_string(corpus.num_tokens()) +
                             " tokens, expected at least 2 to predict one");
  }
  double sum = 0;
  for (int64_t begin = 0; begin < predictions;) {
    const int64_t len = std::min(options.ctx_len, predictions - begin);
    const int64_t rows = std::min(options.batch_size, (predictions - begin) / len);
    const at::Tensor ids = read_windows(corpus, model->config().vocab_size, begin, rows, len);
    const ModelOutput output = model->forward(ids.slice(1, 0, len), model->initial_state(rows));
    sum += token_losses(output.logits_BTV, ids.slice(1, 1, len + 1))
               .to(at::kDouble)
               .sum()
               .item<double>();
    begin += rows * len;
  }
  return {.loss = sum / static_cast<double>(predictions), .num_tokens = predictions};
}

}  // namespace rwkv
