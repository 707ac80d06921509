// Which window of the corpus is sample n: a pure function, so that a run can start anywhere and any
// number of processes agree without speaking.
// A window of ctx_len tokens starts at slot * ctx_len; it and the token after it make inputs and
// targets. There are (num_tokens - 1) / ctx_len slots.
//
// kShuffled, so that another program can follow it. All numbers are unsigned 64-bit and wrap.
//   splitmix(s, r) = the r-th output (r = 0, 1, ...) of SplitMix64 started at s:
//       z = s + (r + 1) * 0x9E3779B97F4A7C15, then splitmix's finaliser
//   mix(z) = that finaliser: z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
//       z = (z ^ (z >> 27)) * 0x94D049BB133111EB; z ^ (z >> 31)
//   n = slots, epoch = sample / n, x = sample % n, a = the least integer with a * a >= n
//   key = splitmix(splitmix(seed, 0) + epoch, 0)
//   repeat: (left, right) = (x / a, x % a); for r = 0 .. 7:
//       (left, right) = (right, (left + mix(splitmix(key, r) + right) % a) % a)
//     x = left * a + right
//   until x < n; the slot is x
// A round can be undone, so this is a permutation of 0 .. a * a - 1, and repeating until x < n
// makes it one of 0 .. n - 1 ("cycle walking"). Eight rounds of a few nanoseconds, no memory.
// Sources: Luby and Rackoff, "How to construct pseudorandom permutations", 1988 (the rounds); Black
// and Rogaway, "Ciphers with arbitrary finite domains", 2002 (both devices); Steele, Lea and Flood,
// "Fast splittable pseudorandom number generators", 2014 (SplitMix64).
#pragma once

#include <cstdint>
#include <string_view>

namespace rwkv {

enum class SampleOrderKind {
  kShuffled,    // every slot once an epoch, in an order that depends on seed and epoch
  kSequential,  // slots in file order
  // RWKV-LM's order, to the sample: for i = sample + 1 and the magic prime p, slot
  // trunc(p * (sqrt(5) - 1) / 2) * i^3 mod p. Slots from p on are never visited.
  // Source: BlinkDL/RWKV-LM RWKV-v5/src/dataset.py, RWKV-v7/train_temp/src/dataset.py.
  kRwkvLm,
};

// Names as in a configuration: "shuffled", "sequential", "rwkv_lm".
// Throws std::invalid_argument listing them for any other.
SampleOrderKind parse_sample_order(std::string_view name);
std::string_view name_of(SampleOrderKind kind);

class SampleOrder {
 public:
  // Throws std::invalid_argument if ctx_len < 1, if num_tokens < ctx_len + 1 (no window fits), or
  // for kRwkvLm if the magic prime is not above nine tenths of num_tokens / ctx_len, as RWKV-LM
  // demands (the corpus is too small for it). Only kShuffled uses the seed.
  SampleOrder(SampleOrderKind kind, int64_t num_tokens, int64_t ctx_len, uint64_t seed);

  // First token of sample n >= 0; the window is [offset, offset + ctx_len], both ends included.
  // Throws std::invalid_argument for a negative n.
  int64_t token_offset(int64_t sample) const;
  // Samples after which every slot that is visited has been visited once: the number of slots, or
  // the magic prime.
  int64_t samples_per_epoch() const { return period_; }
  int64_t ctx_len() const { return ctx_len_; }

 private:
  int64_t slot_of(int64_t sample) const;

  SampleOrderKind kind_;
  int64_t ctx_len_;
  uint64_t seed_;
  int64_t period_ = 0;
  int64_t multiplier_ = 0;  // kRwkvLm: trunc(prime * (sqrt(5) - 1) / 2)
};

// Largest prime p with p mod 3 = 2 and p <= num_tokens / ctx_len - 1; 0 if there is none. Exact for
// every size. Throws std::invalid_argument if ctx_len < 1.
// Source: BlinkDL/RWKV-LM RWKV-v5/compute_magic_prime.py.
int64_t magic_prime(int64_t num_tokens, int64_t ctx_len);

}  // namespace rwkv
