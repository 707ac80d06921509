#include "train/evaluate_documents.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string_view>

#include "data/utf8.h"
#include "train/predict_sequences.h"

namespace rwkv {
namespace {

constexpr size_t kOpeningBytes = 60;
// Enough tokens for that many bytes of most texts.
constexpr int64_t kOpeningTokens = 20;
// Windows that wait to be batched with others of their length, in batches.
constexpr int64_t kWaitingBatches = 16;

// The first characters of a text, white space and what a terminal does not show as spaces.
std::string opening_of(std::string_view text) {
  std::string line;
  while (!text.empty() && line.size() < kOpeningBytes) {
    const size_t length = shown_char_length(text);
    line += length > 0 ? text.substr(0, length) : " ";
    text.remove_prefix(std::max(length, size_t{1}));
  }
  return line;
}

// Collects the windows of many documents, predicts them, and adds up what each document lost.
class DocumentScorer {
 public:
  DocumentScorer(RwkvModel model, const EvaluateOptions& options)
      : model_(std::move(model)), options_(options) {}

  // With what stands before the first token that is predicted; `text_bytes` are those of what is.
  void add(int64_t number, Document document, std::optional<int64_t> text_bytes) {
    const std::vector<int64_t>& ids = document.ids;
    documents_.push_back({.document = number,
                          .num_tokens = std::ssize(ids) - 1,
                          .opening = std::move(document.opening),
                          .text_bytes = text_bytes});
    const int64_t predictions = std::ssize(ids) - 1;
    for (int64_t begin = 0; begin < predictions;) {
      // In this order: a ctx_len may be the greatest number there is.
      const int64_t len = std::min(options_.ctx_len, predictions - begin);
      windows_.emplace_back(ids.begin() + begin, ids.begin() + begin + len + 1);
      owners_.push_back(documents_.size() - 1);
      begin += len;
      if (std::ssize(windows_) == kWaitingBatches * options_.batch_size) {
        flush();
      }
    }
  }

  // Losses of all documents; the scorer is of no use afterwards.
  DocumentEvaluation finish() {
    flush();
    for (DocumentLoss& document : documents_) {
      document.loss /= static_cast<double>(document.num_tokens);
    }
    return {.tokens = sum_.mean(), .documents = std::move(documents_), .text_bytes = {}};
  }

  bool empty() const { return documents_.empty(); }

 private:
  void flush() {
    predict_sequences(model_, windows_, options_.batch_size, [&](const SequencePrediction& window) {
      const std::vector<float> losses = window.losses();
      sum_.add(losses);
      for (const float loss : losses) {
        documents_[owners_[window.sequence]].loss += static_cast<double>(loss);
      }
    });
    windows_.clear();
    owners_.clear();
    if (options_.progress) {
      options_.progress(sum_.num_tokens());
    }
  }

  RwkvModel model_;
  const EvaluateOptions& options_;
  std::vector<std::vector<int64_t>> windows_;
  std::vector<size_t> owners_;           // [window], index in documents_
  std::vector<DocumentLoss> documents_;  // loss: the sum, before finish()
  LossSum sum_;
};

// In the order from good to bad: what is not a number is worse than any loss, an infinite one too.
bool is_better(double loss, double other) {
  return std::isnan(other) ? !std::isnan(loss) : loss < other;
}

// Between the two nearest of the sorted values. Between equal ones nothing is interpolated: between
// infinities that would give no number.
double quantile(std::span<const double> sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = place - static_cast<double>(below);
  return weight == 0 || sorted[below] == sorted[above]
             ? sorted[below]
             : std::lerp(sorted[below], sorted[above], weight);
}

}  // namespace

DocumentSource documents_of(const BinidxFile& corpus,
                            int64_t vocab_size,
                            std::optional<int32_t> end_of_document,
                            const Tokenizer* tokenizer) {
  return [=, &corpus, next = int64_t{0}]() mutable -> std::optional<Document> {
    if (next == corpus.num_documents()) {
      return std::nullopt;
    }
    const int64_t begin = corpus.document_begin(next);
    Document document{.ids =
                          read_ids(corpus, vocab_size, begin, corpus.document_end(next) - begin)};
    ++next;
    if (end_of_document && !document.ids.empty() && document.ids.back() == *end_of_document) {
      document.ids.pop_back();
    }
    if (tokenizer != nullptr) {
      const int64_t count = std::min(kOpeningTokens, std::ssize(document.ids));
      const std::vector<int32_t> first(document.ids.begin(), document.ids.begin() + count);
      document.opening = opening_of(tokenizer->decode(first));
    }
    return document;
  };
}

DocumentSource documents_of(TextReader& reader, const Tokenizer& tokenizer) {
  return [&reader, &tokenizer]() -> std::optional<Document> {
    std::string text;
    for (TextPiece piece; reader.next(piece);) {
      text += piece.text;
      if (piece.ends_document) {
        const std::vector<int32_t> ids = tokenizer.encode(text);
        return Document{.ids = {ids.begin(), ids.end()},
                        .text_bytes = std::ssize(text),
                        .opening = opening_of(text)};
      }
    }
    return std::nullopt;
  };
}

DocumentEvaluation evaluate_documents(RwkvModel model,
                                      const DocumentSource& source,
                                      std::optional<int32_t> start,
                                      const EvaluateOptions& options) {
  DocumentScorer scorer(model, options);
  int64_t number = 0;
  int64_t passed_over = 0;
  // Of a first token that is not predicted, the bytes are not known.
  std::optional<int64_t> text_bytes;
  if (start) {
    text_bytes = 0;
  }
  for (auto document = source(); document; document = source(), ++number) {
    if (!document->text_bytes) {
      text_bytes.reset();
    } else if (text_bytes) {
      *text_bytes += *document->text_bytes;
    }
    if (start) {
      document->ids.insert(document->ids.begin(), *start);
    }
    if (document->ids.size() < 2) {
      ++passed_over;
      continue;
    }
    scorer.add(number, std::move(*document), start ? document->text_bytes : std::nullopt);
  }
  if (scorer.empty()) {
    throw std::runtime_error("none of the " + std::to_string(number) +
                             " documents has a token to predict; is the text empty?");
  }
  DocumentEvaluation evaluation = scorer.finish();
  evaluation.num_passed_over = passed_over;
  evaluation.text_bytes = text_bytes;
  return evaluation;
}

DocumentSummary summarise(std::span<const DocumentLoss> documents, size_t num_worst) {
  DocumentSummary summary;
  std::vector<double> losses;
  for (const DocumentLoss& document : documents) {
    losses.push_back(document.loss);
    summary.mean += document.loss / static_cast<double>(documents.size());
  }
  std::ranges::sort(losses, is_better);
  for (const double share : kQuantiles) {
    summary.quantiles.push_back(quantile(losses, share));
  }
  summary.worst.resize(std::min(num_worst, documents.size()));
  std::partial_sort_copy(documents.begin(),
                         documents.end(),
                         summary.worst.begin(),
                         summary.worst.end(),
                         [](const DocumentLoss& a, const DocumentLoss& b) {
                           return is_better(b.loss, a.loss) ||
                                  (!is_better(a.loss, b.loss) && a.document < b.document);
                         });
  return summary;
}

}  // namespace rwkv
