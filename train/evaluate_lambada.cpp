#include "train/evaluate_lambada.h"

#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>

#include "data/text_reader.h"
#include "train/predict_sequences.h"

namespace rwkv {
namespace {

struct Passages {
  std::vector<std::vector<int64_t>> ids;  // context and target
  std::vector<int64_t> num_targets;       // [passage], the last of its ids
};

[[noreturn]] void fail(const std::string& path, size_t passage, const std::string& what) {
  throw std::runtime_error(path + ": passage " + std::to_string(passage + 1) + ": " + what +
                           "; expected words, the last of them to be guessed");
}

void append(std::vector<int64_t>& ids, const std::vector<int32_t>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

void add_passage(const std::string& path,
                 std::string_view text,
                 const Tokenizer& tokenizer,
                 Passages& passages) {
  const size_t number = passages.ids.size();
  const size_t space = text.rfind(' ');
  if (space == std::string_view::npos) {
    fail(path, number, "there is no space in it");
  }
  std::vector<int64_t> ids;
  if (const auto start = tokenizer.end_of_document()) {
    ids.push_back(*start);
  }
  append(ids, tokenizer.encode(text.substr(0, space)));
  const std::vector<int32_t> target = tokenizer.encode(text.substr(space));
  if (ids.empty() || target.empty()) {
    fail(path,
         number,
         "no token is " + std::string(ids.empty() ? "before" : "in") + " its last word");
  }
  append(ids, target);
  passages.ids.push_back(std::move(ids));
  passages.num_targets.push_back(std::ssize(target));
}

Passages read_passages(const std::string& path, const Tokenizer& tokenizer) {
  if (path.find(".jsonl") == std::string::npos) {
    throw std::invalid_argument(path + ": expected a .jsonl file with a passage in each row");
  }
  TextReader reader({path}, {});
  Passages passages;
  for (TextPiece piece; reader.next(piece);) {
    add_passage(path, piece.text, tokenizer, passages);
  }
  if (passages.ids.empty()) {
    throw std::runtime_error(path + ": holds no passage; is the file cut short?");
  }
  return passages;
}

}  // namespace

LambadaResult evaluate_lambada(RwkvModel model,
                               const Tokenizer& tokenizer,
                               const std::string& path,
                               int64_t batch_size,
                               const std::function<void(int64_t)>& progress) {
  const Passages passages = read_passages(path, tokenizer);
  double log_prob_sum = 0;
  int64_t num_right = 0;
  int64_t num_done = 0;
  predict_sequences(model, passages.ids, batch_size, [&](const SequencePrediction& passage) {
    const int64_t count = passages.num_targets[passage.sequence];
    const int64_t begin = passage.targets_T.size(0) - count;
    const SequencePrediction target{.logits_TV = passage.logits_TV.slice(0, begin),
                                    .targets_T = passage.targets_T.slice(0, begin)};
    const std::vector<float> losses = target.losses();
    log_prob_sum -= std::accumulate(losses.begin(), losses.end(), 0.0);
    num_right += target.logits_TV.argmax(1).equal(target.targets_T) ? 1 : 0;
    if (progress) {
      progress(++num_done);
    }
  });
  const auto num_documents = static_cast<double>(passages.ids.size());
  return {.num_documents = std::ssize(passages.ids),
          .num_target_tokens =
              std::accumulate(passages.num_targets.begin(), passages.num_targets.end(), int64_t{0}),
          .perplexity = std::exp(-log_prob_sum / num_documents),
          .accuracy = static_cast<double>(num_right) / num_documents};
}

}  // namespace rwkv
