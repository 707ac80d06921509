// LAMBADA: how well a model guesses the last word of a passage that only its whole context gives
// away. Counted as RWKV-LM does.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "data/tokenizer.h"
#include "model/rwkv_model.h"

namespace rwkv {

struct LambadaResult {
  int64_t num_documents = 0;
  int64_t num_target_tokens = 0;
  // exp(-mean over documents of log p(last word)): per word, whatever its number of tokens.
  double perplexity = 0;
  // Share of documents all of whose target tokens are the model's likeliest.
  double accuracy = 0;
};

// `path` is a .jsonl (also .gz, .zst) with a passage in "text" of each row. A passage is split at
// its last space: the context is the tokenizer's end-of-document token (if it has one; 0 in World
// and 20B) and the encoding of what comes before the space, the target the encoding of the space
// and the last word. Every passage is predicted from an empty state, batch_size at once.
// `progress`, if given, is called now and then with the passages done.
// Source: BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo.py at 524481d; Paperno et al., "The LAMBADA
// dataset", arXiv:1606.06031.
// Throws std::invalid_argument for a file that is not a .jsonl; std::runtime_error naming file and
// passage for one without a word to predict or without context, and if there are none; what
// TextReader throws.
LambadaResult evaluate_lambada(RwkvModel model,
                               const Tokenizer& tokenizer,
                               const std::string& path,
                               int64_t batch_size,
                               const std::function<void(int64_t)>& progress = nullptr);

}  // namespace rwkv
