// CPU kernel of embedding's backward. Positions are sorted by token (a counting sort keeps their
// order), then a thread owns whole rows of the gradient and writes each once, zeros where a token
// does not occur.
#include <algorithm>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/embedding.h"

namespace rwkv::ops {
namespace {

// Rows that a thread takes at least.
constexpr int64_t kGrain = 64;

// Positions of token v are positions[starts[v]] to positions[starts[v + 1] - 1], rising.
struct PositionsByToken {
  std::vector<int64_t> starts;
  std::vector<int64_t> positions;
};

PositionsByToken sort_by_token(const at::Tensor& tokens_BT, int64_t vocab_size) {
  const auto* tokens = tokens_BT.const_data_ptr<int64_t>();
  const int64_t count = tokens_BT.numel();
  PositionsByToken sorted{std::vector<int64_t>(static_cast<size_t>(vocab_size + 1)),
                          std::vector<int64_t>(static_cast<size_t>(count))};
  for (int64_t n = 0; n < count; ++n) {
    ++sorted.starts[static_cast<size_t>(tokens[n] + 1)];
  }
  for (size_t v = 1; v < sorted.starts.size(); ++v) {
    sorted.starts[v] += sorted.starts[v - 1];
  }
  std::vector<int64_t> next = sorted.starts;
  for (int64_t n = 0; n < count; ++n) {
    const auto place = next[static_cast<size_t>(tokens[n])]++;
    sorted.positions[static_cast<size_t>(place)] = n;
  }
  return sorted;
}

// to = the sum of the rows dy[positions[i]], i < count, which is at least 1.
template <typename Vector, typename Element>
RWKV_INLINE void sum_rows(
    const Element* dy, const int64_t* positions, int64_t count, Element* to, int64_t n_embd) {
  for_each_vector<Vector>(n_embd, [&](int64_t c, int64_t lanes) RWKV_INLINE_LAMBDA {
    Vector sum = load_lanes<Vector>(dy + positions[0] * n_embd + c, lanes);
    for (int64_t i = 1; i < count; ++i) {
      sum += load_lanes<Vector>(dy + positions[i] * n_embd + c, lanes);
    }
    store_lanes(to + c, sum, lanes);
  });
}

template <typename Element>
void backward(const at::Tensor& dy_BTC,
              const PositionsByToken& sorted,
              const at::Tensor& dweight_VC) {
  const int64_t n_embd = dweight_VC.size(1);
  const auto* dy = static_cast<const Element*>(dy_BTC.const_data_ptr());
  auto* dweight = static_cast<Element*>(dweight_VC.mutable_data_ptr());
  at::parallel_for(0, dweight_VC.size(0), kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      Element* to = dweight + v * n_embd;
      const int64_t first = sorted.starts[static_cast<size_t>(v)];
      const int64_t count = sorted.starts[static_cast<size_t>(v + 1)] - first;
      if (count == 0) {
        std::fill(to, to + n_embd, Element{});
      } else {
        with_vectors<ScalarOf<Element>>([&]<typename Vector>(As<Vector>) RWKV_INLINE_LAMBDA {
          sum_rows<Vector>(dy, sorted.positions.data() + first, count, to, n_embd);
        });
      }
    }
  });
}

at::Tensor embedding_backward_cpu(const at::Tensor& dy_BTC,
                                  const at::Tensor& tokens_BT,
                                  int64_t vocab_size) {
  const at::Tensor dweight_VC =
      at::empty({vocab_size, dy_BTC.size(-1)}, dy_BTC.options().requires_grad(false));
  const auto kernel = dy_BTC.scalar_type() == at::kBFloat16 ? &backward<Bf16>
                      : dy_BTC.scalar_type() == at::kFloat  ? &backward<float>
                                                            : &backward<double>;
  kernel(dy_BTC, sort_by_token(tokens_BT, vocab_size), dweight_VC);
  return dweight_VC;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("embedding_backward", &embedding_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
