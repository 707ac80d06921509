#include "train/predict_sequences.h"

#include <algorithm>
#include <numeric>

#include <ATen/ATen.h>

#include "model/ops/cross_entropy.h"

namespace rwkv {
namespace {

using Sequences = std::span<const std::vector<int64_t>>;

// Indices of the sequences, the longest first: memory that does not suffice shows at once.
std::vector<size_t> by_length(Sequences sequences) {
  std::vector<size_t> order(sequences.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return sequences[a].size() > sequences[b].size();
  });
  return order;
}

// Zeros at the ends of the shorter ones. [rows, longest]
at::Tensor padded(Sequences sequences, std::span<const size_t> rows) {
  const auto longest = static_cast<int64_t>(sequences[rows.front()].size());
  at::Tensor ids = at::zeros({static_cast<int64_t>(rows.size()), longest}, at::kLong);
  auto* out = ids.mutable_data_ptr<int64_t>();
  for (const size_t row : rows) {
    std::ranges::copy(sequences[row], out);
    out += longest;
  }
  return ids;
}

}  // namespace

std::vector<float> SequencePrediction::losses() const {
  const at::Tensor losses_T =
      ops::cross_entropy(logits_TV, targets_T, logits_TV.size(1)).to(at::kFloat);
  const auto* data = losses_T.const_data_ptr<float>();
  return {data, data + losses_T.numel()};
}

void predict_sequences(RwkvModel model,
                       Sequences sequences,
                       int64_t batch_size,
                       const std::function<void(const SequencePrediction&)>& visit) {
  const at::NoGradGuard no_grad;
  const std::vector<size_t> order = by_length(sequences);
  for (size_t begin = 0; begin < order.size(); begin += static_cast<size_t>(batch_size)) {
    const size_t num_rows = std::min(static_cast<size_t>(batch_size), order.size() - begin);
    const std::span rows = std::span(order).subspan(begin, num_rows);
    const at::Tensor ids_BL = padded(sequences, rows);
    const at::Tensor inputs_BT = ids_BL.slice(1, 0, ids_BL.size(1) - 1);
    const at::Tensor logits_BTV =
        model->forward(inputs_BT, model->initial_state(inputs_BT.size(0))).logits_BTV;
    for (size_t row = 0; row < num_rows; ++row) {
      const auto batch_row = static_cast<int64_t>(row);
      const auto length = static_cast<int64_t>(sequences[rows[row]].size());
      visit({.sequence = rows[row],
             .logits_TV = logits_BTV[batch_row].slice(0, 0, length - 1),
             .targets_T = ids_BL[batch_row].slice(0, 1, length)});
    }
  }
}

}  // namespace rwkv
