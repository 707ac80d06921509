#include "train/model_tokenizer.h"

#include <stdexcept>

#include "data/tokenizer_registry.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

std::string configured_spec(const WeightFile& model) {
  const auto config = config_in(model);
  if (!config || !config->data.tokenizer) {
    throw std::invalid_argument(model.path +
                                " does not say which tokenizer it was trained with; "
                                "give --tokenizer, one of\n" +
                                describe_tokenizer_specs());
  }
  return *config->data.tokenizer;
}

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer_of(const WeightFile& model,
                                             const std::optional<std::string>& spec) {
  const std::string name = spec ? *spec : configured_spec(model);
  std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(name);
  require_tokenizer_of(model, tokenizer->identity(), "tokenizer \"" + name + "\"");
  return tokenizer;
}

void require_tokenizer_of(const WeightFile& model,
                          const std::string& identity,
                          const std::string& user) {
  const auto trained_with = tokenizer_identity_in(model);
  if (trained_with && *trained_with != identity) {
    throw std::invalid_argument(user + " is of the tokenizer " + identity + ", but " + model.path +
                                " was trained with " + *trained_with +
                                "; ids mean other texts there: use the model's own tokenizer");
  }
}

void require_tokenizer_of(const WeightFile& model, const BinidxFile& corpus) {
  if (corpus.tokenizer_record()) {
    require_tokenizer_of(model, corpus.tokenizer_record()->identity, corpus.prefix() + ".bin");
  }
}

void require_vocabulary_for(const Tokenizer& tokenizer, int64_t vocab_size) {
  if (tokenizer.vocab_size() > vocab_size) {
    throw std::invalid_argument("the tokenizer has " + std::to_string(tokenizer.vocab_size()) +
                                " ids but the model's vocabulary is " + std::to_string(vocab_size) +
                                "; was the model trained with another tokenizer?");
  }
}

}  // namespace rwkv
