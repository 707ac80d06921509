#include "train/generate_text.h"

#include <stdexcept>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "train/model_tokenizer.h"

namespace rwkv {
namespace {

std::vector<int32_t> encode_prompt(const Tokenizer& tokenizer,
                                   const std::string& prompt,
                                   bool continues) {
  std::vector<int32_t> ids;
  const auto end = tokenizer.end_of_document();
  if (end && !(continues && !prompt.empty())) {
    ids.push_back(*end);
  }
  tokenizer.encode_part(prompt, Tokenizer::TextEnd::kFinal, ids);
  if (ids.empty()) {
    throw std::invalid_argument(
        "the prompt is empty, and this tokenizer has no token that starts a document; give some "
        "text");
  }
  return ids;
}

}  // namespace

State generate_text(RwkvModel model,
                    const Tokenizer& tokenizer,
                    const GenerateOptions& options,
                    const std::function<void(std::string_view)>& add_text) {
  const at::NoGradGuard no_grad;
  require_vocabulary_for(tokenizer, model->config().vocab_size);
  const std::vector<int32_t> ids = encode_prompt(tokenizer, options.prompt, options.continues);
  const auto end = tokenizer.end_of_document();
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(options.seed);
  const at::Tensor prompt_1T =
      at::tensor(ids, at::kInt).to(model->device(), at::kLong).unsqueeze(0);
  auto output = model->forward_last(prompt_1T, model->initial_state(1));
  for (int64_t i = 0; i < options.length; ++i) {
    // A vocabulary padded beyond the tokenizer's has ids that stand for no text.
    const at::Tensor logits_V = output.logits_BV[0].slice(0, 0, tokenizer.num_ids()).cpu();
    const int64_t token = sample_token(logits_V, options.sampling, generator);
    if (end && token == *end) {
      return output.state;
    }
    const auto id = static_cast<int32_t>(token);
    add_text(tokenizer.decode(std::span(&id, 1)));
    output = model->forward_last(at::full({1, 1}, token, prompt_1T.options()), output.state);
  }
  return output.state;
}

}  // namespace rwkv
