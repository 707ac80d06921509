#include "model/model_config.h"

#include <stdexcept>

namespace rwkv {
namespace {

// Beyond that no model is, and products of two sizes stay within 64 bits.
constexpr int64_t kMost = int64_t{1} << 31;

void require_at_least(int64_t least, const char* key, int64_t value) {
  if (value < least || value > kMost) {
    throw std::invalid_argument(
        "model." + std::string(key) + " = " + std::to_string(value) + ": must be " +
        (value < least ? std::to_string(least) + " or more" : "at most " + std::to_string(kMost)));
  }
}

}  // namespace

void ModelConfig::validate() const {
  require_at_least(1, "n_layer", n_layer);
  require_at_least(1, "n_embd", n_embd);
  require_at_least(0, "dim_att", dim_att);
  require_at_least(0, "dim_ffn", dim_ffn);
  require_at_least(0, "head_size", head_size);
  require_at_least(0, "rank_mix", rank_mix);
  require_at_least(0, "rank_decay", rank_decay);
  require_at_least(0, "rank_iclr", rank_iclr);
  require_at_least(0, "rank_value", rank_value);
  require_at_least(0, "rank_gate", rank_gate);
  require_at_least(1, "vocab_size", vocab_size);
  require_at_least(1, "ctx_len", ctx_len);
}

}  // namespace rwkv
