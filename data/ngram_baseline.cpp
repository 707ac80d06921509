#include "data/ngram_baseline.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace rwkv {
namespace {

constexpr int64_t kMostIds = int64_t{1} << 31;

// Calls visit(id) for every token in order, reading a bounded stretch at a time.
template <typename Visit>
void for_each_token(const BinidxFile& file, int64_t vocab_size, const Visit& visit) {
  constexpr int64_t kStretch = int64_t{1} << 16;
  std::vector<int64_t> ids;
  for (int64_t begin = 0; begin < file.num_tokens(); begin += kStretch) {
    ids.resize(static_cast<size_t>(std::min(kStretch, file.num_tokens() - begin)));
    file.read(begin, ids);
    require_ids_below(vocab_size, file, begin, ids);
    for (const int64_t id : ids) {
      visit(static_cast<size_t>(id));
    }
  }
}

struct Counts {
  explicit Counts(int64_t vocab_size)
      : tokens(static_cast<size_t>(vocab_size)),
        followed(tokens.size()),
        followers(tokens.size()) {}

  uint64_t pair(size_t before, size_t id) const { return uint64_t{before} * tokens.size() + id; }

  int64_t total = 0;
  std::vector<int64_t> tokens;     // [id]
  std::vector<int64_t> followed;   // [id], times that a token came after
  std::vector<int64_t> followers;  // [id], different tokens that came after
  std::unordered_map<uint64_t, int64_t> pairs;
};

Counts count(const BinidxFile& train, int64_t vocab_size) {
  Counts counts(vocab_size);
  size_t before = 0;
  for_each_token(train, vocab_size, [&](size_t id) {
    ++counts.tokens[id];
    if (counts.total++ > 0) {
      ++counts.followed[before];
      counts.followers[before] += ++counts.pairs[counts.pair(before, id)] == 1 ? 1 : 0;
    }
    before = id;
  });
  return counts;
}

}  // namespace

NgramBaseline ngram_baseline(const BinidxFile& train,
                             const BinidxFile& validation,
                             int64_t vocab_size) {
  if (vocab_size < 1 || vocab_size > kMostIds) {
    throw std::invalid_argument("vocab_size = " + std::to_string(vocab_size) + "; expected 1 to " +
                                std::to_string(kMostIds));
  }
  if (validation.num_tokens() < 2) {
    throw std::runtime_error(validation.prefix() +
                             ".bin: 1 token; a loss takes 2 or more; use a longer corpus");
  }
  const Counts counts = count(train, vocab_size);
  const auto ids = static_cast<double>(vocab_size);
  const auto total = static_cast<double>(counts.total);
  double unigram_sum = 0;
  double bigram_sum = 0;
  bool first = true;
  size_t before = 0;
  for_each_token(validation, vocab_size, [&](size_t id) {
    if (!first) {
      const double p1 = (static_cast<double>(counts.tokens[id]) + 1) / (total + ids);
      double p2 = p1;
      if (counts.followed[before] > 0) {
        const auto found = counts.pairs.find(counts.pair(before, id));
        const auto pair = static_cast<double>(found == counts.pairs.end() ? 0 : found->second);
        const auto followers = static_cast<double>(counts.followers[before]);
        p2 = (pair + followers * p1) / (static_cast<double>(counts.followed[before]) + followers);
      }
      unigram_sum -= std::log(p1);
      bigram_sum -= std::log(p2);
    }
    first = false;
    before = id;
  });
  const auto targets = static_cast<double>(validation.num_tokens() - 1);
  return {unigram_sum / targets, bigram_sum / targets};
}

}  // namespace rwkv
