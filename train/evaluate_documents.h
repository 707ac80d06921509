// Loss of a model on documents, each by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "data/binidx.h"
#include "data/text_reader.h"
#include "data/tokenizer.h"
#include "model/rwkv_model.h"
#include "train/evaluate.h"

namespace rwkv {

// A text without the token that ends it.
struct Document {
  std::vector<int64_t> ids;
  std::optional<int64_t> text_bytes = {};  // bytes of it, where its text is at hand
  std::string opening = {};                // its first words on one line; empty if not known
};

// Gives one document after the other, then nothing.
using DocumentSource = std::function<std::optional<Document>()>;

// Those of a corpus, in order. `end_of_document` is left out where a document ends with it;
// `tokenizer`, which may be null, gives the openings. All must outlive the source. The source
// throws std::runtime_error for an id beyond the vocabulary.
DocumentSource documents_of(const BinidxFile& corpus,
                            int64_t vocab_size,
                            std::optional<int32_t> end_of_document,
                            const Tokenizer* tokenizer);
// Those of text files. Holds one document, text and ids, in memory.
DocumentSource documents_of(TextReader& reader, const Tokenizer& tokenizer);

struct DocumentLoss {
  int64_t document = 0;  // number in the source, from 0
  int64_t num_tokens = 0;
  double loss = 0;                         // mean over its tokens, nats
  std::string opening = {};                // as in Document
  std::optional<int64_t> text_bytes = {};  // of what was predicted, if known
};

struct DocumentEvaluation {
  Evaluation tokens;  // over the tokens of all documents alike
  std::vector<DocumentLoss> documents;
  int64_t num_passed_over = 0;        // documents without a token to predict
  std::optional<int64_t> text_bytes;  // of what was predicted, where every document says its own
};

// Predicts every document from an empty state after `start`, the token that stands between
// documents in training; without one, a document's first token is given and not predicted. Nothing
// is predicted from the document before, and the end of a document is not predicted: losses do not
// depend on which documents are neighbours, and bits per byte compare tokenizers that end documents
// differently. Longer documents are cut into windows of ctx_len as in evaluate().
// options.max_tokens is not for documents and must be absent. Throws std::runtime_error if there is
// nothing to predict; what the source throws.
DocumentEvaluation evaluate_documents(RwkvModel model,
                                      const DocumentSource& source,
                                      std::optional<int32_t> start,
                                      const EvaluateOptions& options);

// Summary of the documents' losses, each document counting once.
struct DocumentSummary {
  double mean = 0;
  std::vector<double> quantiles;    // at kQuantiles, between neighbours linearly interpolated
  std::vector<DocumentLoss> worst;  // of highest loss, the worst first
};
inline constexpr double kQuantiles[] = {0, 0.1, 0.25, 0.5, 0.75, 0.9, 1};
// `documents` must not be empty; as many as num_worst are listed, if there are.
DocumentSummary summarise(std::span<const DocumentLoss> documents, size_t num_worst);

}  // namespace rwkv
