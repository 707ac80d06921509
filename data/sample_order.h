// Which window of the corpus is sample n: a pure function, so that a run can start anywhere and any
// number of processes agree without speaking.
// A window of ctx_len tokens starts at slot * ctx_len; it and the token after it make inputs and
// targets. There are (num_tokens - 1) / ctx_len slots.
#pragma once

#include <cstdint>
#include <string_view>

namespace rwkv {

enum class SampleOrderKind {
  kShuffled,    // every slot once an epoch, in an order that depends on seed and epoch
  kSequential,  // slots in file order
  kRwkvLm,      // RWKV-LM's cubic walk over the magic prime: its runs' order, to the sample
};

// Names as in a configuration: "shuffled", "sequential", "rwkv_lm".
// Throws std::invalid_argument listing them for any other.
SampleOrderKind parse_sample_order(std::string_view name);
std::string_view name_of(SampleOrderKind kind);

class SampleOrder {
 public:
  // Throws std::invalid_argument if num_tokens < ctx_len + 1 (no window fits), or for kRwkvLm if no
  // magic prime with more than nine tenths of the slots exists (the corpus is too small for it).
  SampleOrder(SampleOrderKind kind, int64_t num_tokens, int64_t ctx_len, uint64_t seed);

  // First token of sample n >= 0; the window is [offset, offset + ctx_len], both ends included.
  int64_t token_offset(int64_t sample) const;
  // Samples after which every slot that is visited has been visited once: the number of slots, or
  // the magic prime.
  int64_t samples_per_epoch() const { return period_; }

 private:
  SampleOrderKind kind_;
  int64_t ctx_len_;
  uint64_t seed_;
  int64_t period_;
  int64_t multiplier_ = 0;  // kRwkvLm: trunc(prime * (sqrt(5) - 1) / 2)
};

// Largest prime p with p mod 3 = 2 and p <= num_tokens / ctx_len - 1; 0 if there is none.
// Source: BlinkDL/RWKV-LM RWKV-v5/compute_magic_prime.py.
int64_t magic_prime(int64_t num_tokens, int64_t ctx_len);

}  // namespace rwkv
