#include "train/distributed/weight_comparison.h"

#include <algorithm>
#include <map>
#include <vector>

#include <ATen/ATen.h>

#include <spdlog/fmt/fmt.h>

#include "data/content_hash.h"

namespace rwkv {
namespace {

// Words of a GPU's at once: what is made of them takes 16 times their bytes.
constexpr int64_t kWords = int64_t{1} << 22;

// Odd factors have inverses modulo 2^64: no change of a single word is lost, nor is an exchange of
// two. `position` is the number of the first word.
at::Tensor weighted_sum(const at::Tensor& words, int64_t position) {
  at::Tensor sum = at::zeros({}, words.options().dtype(at::kLong));
  for (int64_t begin = 0; begin < words.numel(); begin += kWords) {
    const at::Tensor part = words.slice(0, begin, begin + kWords).to(at::kLong);
    const int64_t first = position + begin;
    sum += (part * at::arange(2 * first + 1, 2 * (first + part.numel()), 2, part.options())).sum();
  }
  return sum;
}

}  // namespace

int64_t weights_fingerprint(RwkvModel model) {
  const at::NoGradGuard no_grad;
  ContentHasher hasher;
  at::Tensor sum;
  int64_t position = 0;
  for (const auto& item : model->named_parameters()) {
    const at::Tensor flat = item.value().detach().contiguous().view({-1});
    if (flat.is_cpu()) {
      hasher.add({static_cast<const std::byte*>(flat.const_data_ptr()), flat.nbytes()});
      continue;
    }
    const at::Tensor words = flat.view(flat.element_size() == 2 ? at::kShort : at::kInt);
    const at::Tensor of_this = weighted_sum(words, position);
    sum = sum.defined() ? sum + of_this : of_this;
    position += words.numel();
  }
  return sum.defined()
             ? sum.item<int64_t>()
             : static_cast<int64_t>(std::stoull(hasher.hash().substr(0, 16), nullptr, 16));
}

std::string find_drift(std::span<const int64_t> fingerprints) {
  std::map<int64_t, std::vector<int64_t>> ranks;
  for (size_t rank = 0; rank < fingerprints.size(); ++rank) {
    ranks[fingerprints[rank]].push_back(static_cast<int64_t>(rank));
  }
  if (ranks.size() == 1) {
    return "";
  }
  const auto most =
      std::ranges::max_element(ranks, {}, [](const auto& group) { return group.second.size(); });
  std::vector<int64_t> others;
  for (const auto& [fingerprint, group] : ranks) {
    if (2 * most->second.size() <= fingerprints.size() || fingerprint != most->first) {
      others.insert(others.end(), group.begin(), group.end());
    }
  }
  std::ranges::sort(others);
  if (others.size() == fingerprints.size()) {
    return fmt::format("the weights of ranks {} are not the same", fmt::join(others, ", "));
  }
  return fmt::format("the weights of rank{} {} are not those of the other {}",
                     others.size() == 1 ? "" : "s",
                     fmt::join(others, ", "),
                     most->second.size());
}

void require_same_weights(RwkvModel model, Communicator& communicator) {
  const std::string drift = find_drift(communicator.values_of_all(
      weights_fingerprint(std::move(model)), "the comparison of weights"));
  if (!drift.empty()) {
    throw DistributedError(drift +
                           ", though every process makes the same updates: a memory or a processor "
                           "is faulty. Nothing more is saved; begin again from the newest "
                           "checkpoint, without that machine if it happens twice");
  }
}

}  // namespace rwkv
