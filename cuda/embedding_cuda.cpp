// embedding's gradient on CUDA: LibTorch sorts the tokens, our kernel sums their rows.
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/embedding_kernel.h"

namespace rwkv {
namespace {

at::Tensor embedding(const at::Tensor& weight_VC, const at::Tensor& tokens_BT) {
  std::vector<int64_t> shape = tokens_BT.sizes().vec();
  shape.push_back(weight_VC.size(1));
  const at::Tensor out = at::empty(shape, weight_VC.options());
  with_element("embedding", weight_VC, [&](auto element) {
    using Element = decltype(element);
    const EmbeddingForward<Element> arguments{.N = tokens_BT.numel(),
                                              .V = weight_VC.size(0),
                                              .C = weight_VC.size(1),
                                              .weight = pointer<Element>(weight_VC),
                                              .tokens = pointer<int64_t>(tokens_BT),
                                              .out = mutable_pointer<Element>(out)};
    RWKV_CUDA_CHECK(
        launch_embedding(arguments, current_stream()), "embedding of ", tokens_BT.sizes());
  });
  return out;
}

at::Tensor embedding_backward(const at::Tensor& dy_BTC,
                              const at::Tensor& tokens_BT,
                              int64_t vocab_size) {
  const int64_t n_embd = dy_BTC.size(-1);
  const int64_t num_tokens = tokens_BT.numel();
  const auto [sorted_N, order_N] =
      at::sort(tokens_BT.flatten(), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const at::Tensor dweight_VC = at::empty({vocab_size, n_embd}, dy_BTC.options());
  const at::Tensor scratch = at::empty({embedding_backward_scratch_size(num_tokens, n_embd)},
                                       dy_BTC.options().dtype(at::kFloat));
  const at::Tensor& sorted = sorted_N;
  const at::Tensor& order = order_N;
  with_element("embedding backward", dy_BTC, [&](auto element) {
    using Element = decltype(element);
    const EmbeddingBackward<Element> arguments{.N = num_tokens,
                                               .V = vocab_size,
                                               .C = n_embd,
                                               .dy = pointer<Element>(dy_BTC),
                                               .sorted_tokens = pointer<int64_t>(sorted),
                                               .order = pointer<int64_t>(order),
                                               .dweight = mutable_pointer<Element>(dweight_VC),
                                               .scratch = mutable_pointer<float>(scratch)};
    RWKV_CUDA_CHECK(launch_embedding_backward(arguments, current_stream()),
                    "embedding backward of ",
                    dy_BTC.sizes());
  });
  return dweight_VC;
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("embedding", &embedding);
  library.impl("embedding_backward", &embedding_backward);
}

}  // namespace
}  // namespace rwkv
