// Which tokenizer goes with a model.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "data/binidx.h"
#include "data/tokenizer.h"
#include "model/formats/weight_file.h"

namespace rwkv {

// Opens the tokenizer that `spec` names (data/tokenizer_registry.h), else the one that the model's
// run was configured with. Throws std::invalid_argument if neither is given, and as
// require_tokenizer_of() does; what open_tokenizer() throws.
std::unique_ptr<Tokenizer> open_tokenizer_of(const WeightFile& model,
                                             const std::optional<std::string>& spec);

// Throws std::invalid_argument naming both tokenizers unless `identity` is that of the one the
// model was trained with; a model that does not say which that was goes with any. `user` is what
// has the identity, as "corpus.bin" or "--tokenizer bytes".
void require_tokenizer_of(const WeightFile& model,
                          const std::string& identity,
                          const std::string& user);

// The same of a corpus, unless that does not say which tokenizer made it.
void require_tokenizer_of(const WeightFile& model, const BinidxFile& corpus);

// Throws std::invalid_argument with both numbers if the tokenizer has more ids than the model.
void require_vocabulary_for(const Tokenizer& tokenizer, int64_t vocab_size);

}  // namespace rwkv
