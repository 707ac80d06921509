#include "model/ops/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

void check_arguments(const at::Tensor& logits_NP, const at::Tensor& targets_N, int64_t vocab_size) {
  TORCH_CHECK(vocab_size >= 1 && logits_NP.dim() == 2 && logits_NP.size(0) >= 1 &&
                  logits_NP.size(1) >= vocab_size,
              "cross_entropy: logits_NP is ",
              logits_NP.sizes(),
              ", expected [N, P] with N >= 1 and P >= vocab_size = ",
              vocab_size,
              " >= 1");
  const at::ScalarType dtype = logits_NP.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "cross_entropy: logits_NP is ",
              dtype,
              ", expected bfloat16, float or double");
  TORCH_CHECK(logits_NP.is_contiguous(), "cross_entropy: logits_NP is not contiguous");
  TORCH_CHECK(
      targets_N.sizes() == logits_NP.sizes().slice(0, 1) && targets_N.scalar_type() == at::kLong,
      "cross_entropy: targets_N is ",
      targets_N.scalar_type(),
      " ",
      targets_N.sizes(),
      ", expected Long [",
      logits_NP.size(0),
      "]");
  check_targets(targets_N, vocab_size);
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("cross_entropy(Tensor logits, Tensor targets, int vocab_size) -> Tensor");
  library.def(
      "cross_entropy_gradient_(Tensor(a!) logits, Tensor targets, int vocab_size, float l2wrap, "
      "float scale) -> Tensor");
}

}  // namespace

at::Tensor cross_entropy(const at::Tensor& logits_NP,
                         const at::Tensor& targets_N,
                         int64_t vocab_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::cross_entropy", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t)>();
  check_arguments(logits_NP, targets_N, vocab_size);
  return op.call(logits_NP, targets_N.contiguous(), vocab_size);
}

at::Tensor cross_entropy_gradient_(const at::Tensor& logits_NP,
                                   const at::Tensor& targets_N,
                                   int64_t vocab_size,
                                   double l2wrap,
                                   double scale) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("rookery::cross_entropy_gradient_", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, int64_t, double, double)>();
  check_arguments(logits_NP, targets_N, vocab_size);
  return op.call(logits_NP, targets_N.contiguous(), vocab_size, l2wrap, scale);
}

void check_targets(const at::Tensor& targets_N, int64_t vocab_size) {
  if (!targets_N.is_cpu()) {
    return;
  }
  const at::Tensor in_order_N = targets_N.contiguous();
  const auto* targets = in_order_N.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < in_order_N.numel(); ++n) {
    TORCH_CHECK(targets[n] >= 0 && targets[n] < vocab_size,
                "cross_entropy: target ",
                targets[n],
                " of row ",
                n,
                " is not in [0, ",
                vocab_size,
                ")");
  }
}

}  // namespace rwkv::ops
