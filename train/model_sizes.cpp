#include "train/model_sizes.h"

#include <stdexcept>

#include "train/config_value.h"

namespace rwkv {
namespace {

// A size that a configuration may leave out, and must not contradict.
void confirm(const char* key, int64_t& given, int64_t told, const std::string& by) {
  if (given != 0 && given != told) {
    reject_value(key,
                 to_config_text(given),
                 "but " + by + " has " + to_config_text(told) + "; leave the key out");
  }
  given = told;
}

}  // namespace

void confirm_sizes(RunConfig& config, const ModelConfig& told, const std::string& by) {
  ModelConfig& model = config.model;
  if (!model.version.empty() && model.version != told.version) {
    reject_value("model.version",
                 to_config_text(std::string_view(model.version)),
                 "but " + by + " is " + told.version + "; leave the key out");
  }
  model.version = told.version;
  confirm("model.n_layer", model.n_layer, told.n_layer, by);
  confirm("model.n_embd", model.n_embd, told.n_embd, by);
  confirm("model.dim_att", model.dim_att, told.dim_att, by);
  confirm("model.dim_ffn", model.dim_ffn, told.dim_ffn, by);
  confirm("model.head_size", model.head_size, told.head_size, by);
  confirm("model.rank_mix", model.rank_mix, told.rank_mix, by);
  confirm("model.rank_decay", model.rank_decay, told.rank_decay, by);
  confirm("model.rank_iclr", model.rank_iclr, told.rank_iclr, by);
  confirm("model.rank_value", model.rank_value, told.rank_value, by);
  confirm("model.rank_gate", model.rank_gate, told.rank_gate, by);
  if (model.vocab_size > told.vocab_size && config.init.vocab_growth == VocabGrowth::kRefuse) {
    reject_value("model.vocab_size",
                 to_config_text(model.vocab_size),
                 "but " + by + " has " + to_config_text(told.vocab_size) +
                     " rows; leave the key out, or give init.vocab_growth = \"mean\" or \"zero\" "
                     "to say what new rows begin with");
  }
  if (model.vocab_size < told.vocab_size) {
    confirm("model.vocab_size", model.vocab_size, told.vocab_size, by);
  }
}

void resolve_vocab_size(ModelConfig& model, const BinidxFile& corpus) {
  const auto& record = corpus.tokenizer_record();
  if (model.vocab_size == 0 && !record) {
    throw std::invalid_argument("model.vocab_size is not given, and " + corpus.prefix() +
                                ".tokenizer.json, which would say it, is not there; give the "
                                "vocabulary size of the tokenizer that made the corpus");
  }
  if (model.vocab_size == 0) {
    model.vocab_size = record->vocab_size;
  }
  if (record && model.vocab_size < record->vocab_size) {
    throw std::invalid_argument("model.vocab_size = " + std::to_string(model.vocab_size) + ": " +
                                corpus.prefix() + ".bin was made by a tokenizer of " +
                                std::to_string(record->vocab_size) + " ids; use that or more");
  }
}

}  // namespace rwkv
