// Text from a model in RNN mode: constant time and memory a token.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "data/tokenizer.h"
#include "model/generate.h"
#include "model/rwkv_model.h"

namespace rwkv {

struct GenerateOptions {
  std::string prompt;  // to continue; empty starts a document
  int64_t length = 100;
  SamplingOptions sampling;
  uint64_t seed = 1;
  bool continues = false;  // the prompt goes on with the model's initial state
};

// Hands the bytes of one token after another to `add_text`, the prompt not among them, until
// `length` tokens are drawn or the document ends. A text begins where another ended: where the
// tokenizer has a token for that, it goes in front of the prompt. Throws std::invalid_argument if
// the tokenizer has more ids than the model, or if there is nothing to begin with.
// A prompt that continues a state has no such token in front, unless it is empty.
// Returns the state after prompt and text.
State generate_text(RwkvModel model,
                    const Tokenizer& tokenizer,
                    const GenerateOptions& options,
                    const std::function<void(std::string_view)>& add_text);

}  // namespace rwkv
