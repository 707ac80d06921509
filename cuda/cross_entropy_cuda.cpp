// cross_entropy and its gradient on CUDA: tensors to pointers.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/cross_entropy_kernel.h"
#include "cuda/device.h"

namespace rwkv {
namespace {

at::Tensor empty_losses(const at::Tensor& logits_NP) {
  return at::empty({logits_NP.size(0)}, logits_NP.options().dtype(at::kFloat));
}

at::Tensor cross_entropy(const at::Tensor& logits_NP,
                         const at::Tensor& targets_N,
                         int64_t vocab_size) {
  at::Tensor losses_N = empty_losses(logits_NP);
  with_element("cross_entropy", logits_NP, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_cross_entropy(pointer<Element>(logits_NP),
                                         pointer<int64_t>(targets_N),
                                         mutable_pointer<float>(losses_N),
                                         logits_NP.size(0),
                                         vocab_size,
                                         logits_NP.size(1),
                                         current_stream()),
                    "cross_entropy of ",
                    logits_NP.sizes());
  });
  return losses_N;
}

at::Tensor cross_entropy_gradient(const at::Tensor& logits_NP,
                                  const at::Tensor& targets_N,
                                  int64_t vocab_size,
                                  double l2wrap,
                                  double scale) {
  at::Tensor losses_N = empty_losses(logits_NP);
  with_element("cross_entropy_gradient_", logits_NP, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_cross_entropy_gradient(mutable_pointer<Element>(logits_NP),
                                                  pointer<int64_t>(targets_N),
                                                  mutable_pointer<float>(losses_N),
                                                  logits_NP.size(0),
                                                  vocab_size,
                                                  logits_NP.size(1),
                                                  static_cast<float>(l2wrap),
                                                  static_cast<float>(scale),
                                                  current_stream()),
                    "cross_entropy_gradient_ of ",
                    logits_NP.sizes());
  });
  return losses_N;
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("cross_entropy", &cross_entropy);
  library.impl("cross_entropy_gradient_", &cross_entropy_gradient);
}

}  // namespace
}  // namespace rwkv
