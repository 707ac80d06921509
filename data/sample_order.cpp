#include "data/sample_order.h"

#include <cmath>
#include <stdexcept>
#include <string>

#include "data/number_text.h"

namespace rwkv {
namespace {

__extension__ using Wide = unsigned __int128;

struct OrderName {
  std::string_view name;
  SampleOrderKind kind;
};

constexpr OrderName kOrderNames[] = {
    {"shuffled", SampleOrderKind::kShuffled},
    {"sequential", SampleOrderKind::kSequential},
    {"rwkv_lm", SampleOrderKind::kRwkvLm},
};

uint64_t multiply_mod(uint64_t a, uint64_t b, uint64_t modulus) {
  return static_cast<uint64_t>(Wide{a} * b % modulus);
}

uint64_t power_mod(uint64_t base, uint64_t exponent, uint64_t modulus) {
  uint64_t result = 1 % modulus;
  for (base %= modulus; exponent > 0; exponent /= 2) {
    if (exponent % 2 == 1) {
      result = multiply_mod(result, base, modulus);
    }
    base = multiply_mod(base, base, modulus);
  }
  return result;
}

// Miller and Rabin's test. With the first twelve primes as bases it makes no mistake below
// 3.18e23 (Sorenson and Webster, "Strong pseudoprimes to twelve prime bases", 2015).
bool is_prime(uint64_t n) {
  constexpr uint64_t kBases[] = {2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37};
  for (const uint64_t base : kBases) {
    if (n % base == 0) {
      return n == base;
    }
  }
  if (n < 2) {
    return false;
  }
  uint64_t odd = n - 1;
  int twos = 0;
  for (; odd % 2 == 0; odd /= 2) {
    ++twos;
  }
  for (const uint64_t base : kBases) {
    uint64_t x = power_mod(base, odd, n);
    bool witness = x != 1 && x != n - 1;
    for (int i = 1; i < twos && witness; ++i) {
      x = multiply_mod(x, x, n);
      witness = x != n - 1;
    }
    if (witness) {
      return false;
    }
  }
  return true;
}

uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
  return z ^ (z >> 31);
}

uint64_t splitmix(uint64_t state, uint64_t r) {
  return mix(state + (r + 1) * 0x9E3779B97F4A7C15U);
}

uint64_t ceil_sqrt(uint64_t n) {
  // The root of a double may be off by one either way at 53 bits and more.
  auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(n)));
  while (Wide{root} * root >= n && root > 0) {
    --root;
  }
  while (Wide{root} * root < n) {
    ++root;
  }
  return root;
}

uint64_t shuffled_slot(uint64_t sample, uint64_t slots, uint64_t seed) {
  const uint64_t key = splitmix(splitmix(seed, 0) + sample / slots, 0);
  const uint64_t side = ceil_sqrt(slots);
  uint64_t x = sample % slots;
  do {
    uint64_t left = x / side;
    uint64_t right = x % side;
    for (uint64_t r = 0; r < 8; ++r) {
      const uint64_t sum = (left + mix(splitmix(key, r) + right) % side) % side;
      left = right;
      right = sum;
    }
    x = left * side + right;
  } while (x >= slots);
  return x;
}

std::string counted(int64_t number) {
  return grouped(static_cast<uint64_t>(number));
}

}  // namespace

SampleOrderKind parse_sample_order(std::string_view name) {
  std::string known;
  for (const OrderName& order : kOrderNames) {
    if (order.name == name) {
      return order.kind;
    }
    known.append(known.empty() ? "" : ", ").append(order.name);
  }
  throw std::invalid_argument("\"" + std::string(name) +
                              "\" is no order of samples; expected one " + "of " + known);
}

std::string_view name_of(SampleOrderKind kind) {
  for (const OrderName& order : kOrderNames) {
    if (order.kind == kind) {
      return order.name;
    }
  }
  throw std::invalid_argument("SampleOrderKind " + std::to_string(static_cast<int>(kind)) +
                              " has no name");
}

int64_t magic_prime(int64_t num_tokens, int64_t ctx_len) {
  if (ctx_len < 1) {
    throw std::invalid_argument("ctx_len = " + std::to_string(ctx_len) + "; expected 1 or more");
  }
  for (int64_t p = num_tokens / ctx_len - 1; p >= 2; --p) {
    if (p % 3 == 2 && is_prime(static_cast<uint64_t>(p))) {
      return p;
    }
  }
  return 0;
}

SampleOrder::SampleOrder(SampleOrderKind kind, int64_t num_tokens, int64_t ctx_len, uint64_t seed)
    : kind_(kind), ctx_len_(ctx_len), seed_(seed) {
  if (ctx_len < 1) {
    throw std::invalid_argument("ctx_len = " + std::to_string(ctx_len) + "; expected 1 or more");
  }
  if (num_tokens <= ctx_len) {
    throw std::invalid_argument("the corpus has " + std::to_string(num_tokens) +
                                " tokens, but a window of ctx_len = " + std::to_string(ctx_len) +
                                " takes ctx_len + 1; use a longer corpus or a smaller ctx_len");
  }
  period_ = (num_tokens - 1) / ctx_len;
  if (kind != SampleOrderKind::kRwkvLm) {
    return;
  }
  const int64_t prime = magic_prime(num_tokens, ctx_len);
  const int64_t windows = num_tokens / ctx_len;
  // prime / windows > 0.9 in whole numbers that cannot overflow.
  if (prime <= windows - windows / 10 - (windows % 10 == 0 ? 0 : 1)) {
    throw std::invalid_argument(
        "order rwkv_lm: a corpus of " + counted(num_tokens) + " tokens has " + counted(windows) +
        " windows of ctx_len = " + std::to_string(ctx_len) + ", and the magic prime for it, " +
        counted(prime) + ", is not above nine tenths of that, as RWKV-LM demands; use order " +
        "shuffled, a longer corpus or a smaller ctx_len");
  }
  period_ = prime;
  // In double, as RWKV-LM computes it: the exact product may truncate to another number.
  multiplier_ = static_cast<int64_t>(static_cast<double>(prime) * ((std::sqrt(5.0) - 1.0) / 2.0));
}

int64_t SampleOrder::slot_of(int64_t sample) const {
  switch (kind_) {
    case SampleOrderKind::kShuffled:
      return static_cast<int64_t>(
          shuffled_slot(static_cast<uint64_t>(sample), static_cast<uint64_t>(period_), seed_));
    case SampleOrderKind::kSequential:
      return sample % period_;
    case SampleOrderKind::kRwkvLm:
      break;
  }
  const auto p = static_cast<uint64_t>(period_);
  const uint64_t i = (static_cast<uint64_t>(sample) + 1) % p;
  const uint64_t cube = multiply_mod(multiply_mod(i, i, p), i, p);
  return static_cast<int64_t>(multiply_mod(static_cast<uint64_t>(multiplier_), cube, p));
}

int64_t SampleOrder::token_offset(int64_t sample) const {
  if (sample < 0) {
    throw std::invalid_argument("sample " + std::to_string(sample) + " was asked for; expected 0 " +
                                "or more");
  }
  return slot_of(sample) * ctx_len_;
}

}  // namespace rwkv
