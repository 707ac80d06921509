// The sizes of a run's model that its configuration may leave to the corpus and to the weights that
// it begins with. No Torch here: a run is planned without it.
#pragma once

#include <string>

#include "data/binidx.h"
#include "train/run_config.h"

namespace rwkv {

// Takes version and sizes from `told`, those of the weights that the run begins with or goes on
// from. Throws std::invalid_argument naming the key, both values and `by`, which has the weights,
// where the configuration says something else; a larger vocabulary is init.vocab_growth's affair.
void confirm_sizes(RunConfig& config, const ModelConfig& told, const std::string& by);

// Takes the vocabulary size of the corpus' tokenizer where none is given. Throws
// std::invalid_argument if the corpus does not say it, or says more than is given.
void resolve_vocab_size(ModelConfig& model, const BinidxFile& corpus);

}  // namespace rwkv
