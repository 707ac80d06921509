// What `rookery eval` prints: for people, or as one JSON object.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "train/evaluate.h"
#include "train/evaluate_documents.h"
#include "train/evaluate_lambada.h"

namespace rwkv {

struct EvalOutput {
  std::string model = {};   // path of the weights
  std::string source = {};  // the corpus, or the text files
  int64_t ctx_len = 0;
  Evaluation evaluation = {};
  // Bytes of text for each token predicted, if known: gives bits per byte.
  std::optional<double> bytes_per_token = {};
  // Other models' losses on the same tokens, by name.
  std::vector<std::pair<std::string, double>> baselines = {};

  bool with_positions = false;
  struct Documents {
    std::vector<DocumentLoss> each;  // in the order of the source
    int64_t num_passed_over = 0;
    DocumentSummary summary;
  };
  std::optional<Documents> documents = {};
};

void print_text(const EvalOutput& output);
void print_json(const EvalOutput& output);

void print_text(const LambadaResult& result, const std::string& path);
void print_json(const LambadaResult& result, const std::string& path, const std::string& model);

}  // namespace rwkv
