#include "model/ops/head_loss.h"

#include <algorithm>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "model/ops/cross_entropy.h"
#include "model/ops/head_chunks.h"

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

void check_arguments(const at::Tensor& hidden_NC,
                     const at::Tensor& weight_VC,
                     const at::Tensor& targets_N,
                     const HeadLossSettings& settings) {
  const at::ScalarType dtype = hidden_NC.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "head_loss: hidden_NC is ",
              dtype,
              ", expected bfloat16, float or double");
  TORCH_CHECK(hidden_NC.dim() == 2 && hidden_NC.size(0) >= 1,
              "head_loss: hidden_NC is ",
              hidden_NC.sizes(),
              ", expected [N, C] with N >= 1");
  TORCH_CHECK(weight_VC.dim() == 2 && weight_VC.size(0) >= 1 &&
                  weight_VC.size(1) == hidden_NC.size(1) && weight_VC.scalar_type() == dtype,
              "head_loss: weight_VC is ",
              weight_VC.scalar_type(),
              " ",
              weight_VC.sizes(),
              " but hidden_NC is ",
              dtype,
              " ",
              hidden_NC.sizes());
  TORCH_CHECK(
      targets_N.sizes() == hidden_NC.sizes().slice(0, 1) && targets_N.scalar_type() == at::kLong,
      "head_loss: targets_N is ",
      targets_N.scalar_type(),
      " ",
      targets_N.sizes(),
      ", expected Long [",
      hidden_NC.size(0),
      "]");
  TORCH_CHECK(settings.rows_per_chunk.value_or(1) >= 1 && settings.vocab_multiple.value_or(1) >= 1,
              "head_loss: rows_per_chunk is ",
              settings.rows_per_chunk.value_or(1),
              " and vocab_multiple ",
              settings.vocab_multiple.value_or(1),
              ", expected at least 1");
  check_targets(targets_N, weight_VC.size(0));
}

at::Tensor padded(const at::Tensor& weight_VC, int64_t vocab_multiple) {
  const int64_t padding = round_up(weight_VC.size(0), vocab_multiple) - weight_VC.size(0);
  return padding == 0 ? weight_VC : at::constant_pad_nd(weight_VC, {0, 0, 0, padding});
}

// Calls `work(first row, end)` for each chunk.
template <typename Work>
void for_each_chunk(int64_t rows, int64_t rows_per_chunk, const Work& work) {
  for (int64_t begin = 0; begin < rows; begin += rows_per_chunk) {
    work(begin, std::min(begin + rows_per_chunk, rows));
  }
}

at::Tensor head_loss_without_gradient(const at::Tensor& hidden_NC,
                                      const at::Tensor& weight_VC,
                                      const at::Tensor& targets_N,
                                      double /*l2wrap*/,
                                      int64_t rows_per_chunk,
                                      int64_t vocab_multiple) {
  tensor_list losses_N;  // [chunk]
  const at::Tensor weight_PC = padded(weight_VC, vocab_multiple);
  for_each_chunk(hidden_NC.size(0), rows_per_chunk, [&](int64_t begin, int64_t end) {
    const at::Tensor logits_NP = at::mm(hidden_NC.slice(0, begin, end), weight_PC.t());
    losses_N.push_back(cross_entropy(logits_NP, targets_N.slice(0, begin, end), weight_VC.size(0)));
  });
  return at::cat(losses_N).mean();
}

// dW = sum over chunks of dl^T x.
class WeightGradient {
 public:
  WeightGradient(at::ScalarType dtype, bool one_chunk) : dtype_(dtype), one_chunk_(one_chunk) {}

  void add(const at::Tensor& dlogits_NP, const at::Tensor& hidden_NC) {
    const at::Tensor dlogits_PN = dlogits_NP.t();
    if (one_chunk_) {
      sum_PC_ = at::mm(dlogits_PN, hidden_NC);
      return;
    }
    const bool is_first = !sum_PC_.defined();
    if (is_first) {
      const at::ScalarType sum_dtype = dtype_ == at::kBFloat16 ? at::kFloat : dtype_;
      sum_PC_ =
          at::empty({dlogits_PN.size(0), hidden_NC.size(1)}, dlogits_PN.options().dtype(sum_dtype));
    }
    // Zero leaves out what the sum holds before the first chunk, whatever it is.
    const int64_t kept = is_first ? 0 : 1;
    if (sum_PC_.scalar_type() == dtype_) {
      sum_PC_.addmm_(dlogits_PN, hidden_NC, kept);
    } else if (sum_PC_.is_cuda()) {
      at::addmm_out(sum_PC_, sum_PC_, dlogits_PN, hidden_NC, at::kFloat, kept);
    } else if (is_first) {
      sum_PC_.copy_(at::mm(dlogits_PN, hidden_NC));
    } else {
      sum_PC_.add_(at::mm(dlogits_PN, hidden_NC));
    }
  }

  at::Tensor of_vocabulary(int64_t vocab_size) const {
    return sum_PC_.slice(0, 0, vocab_size).to(dtype_);
  }

 private:
  at::ScalarType dtype_;
  bool one_chunk_;
  at::Tensor sum_PC_;
};

// A factor rounded to bf16 would be wrong by up to 1/512 of itself. Torch does that to a scalar on
// a device, and to a number anywhere, but to no tensor of one dimension; on the CPU, where that
// would take 20 times as long, it keeps a scalar tensor in fp32.
void scale_in_fp32(at::Tensor& gradient, const at::Tensor& factor) {
  if (!factor.is_cpu()) {
    gradient.mul_(factor.view({1}));
  } else if (factor.item<double>() != 1) {
    gradient.mul_(factor);
  }
}

struct HeadLossFunction : torch::autograd::Function<HeadLossFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& hidden_NC,
                            const at::Tensor& weight_VC,
                            const at::Tensor& targets_N,
                            double l2wrap,
                            int64_t rows_per_chunk,
                            int64_t vocab_multiple) {
    const at::AutoDispatchBelowAutograd below;
    const int64_t rows = hidden_NC.size(0);
    tensor_list losses_N;  // [chunk]
    const at::Tensor weight_PC = padded(weight_VC, vocab_multiple);
    at::Tensor dhidden_NC;
    if (hidden_NC.requires_grad()) {
      dhidden_NC = at::empty_like(hidden_NC);
    }
    WeightGradient dweight(weight_VC.scalar_type(), rows <= rows_per_chunk);
    for_each_chunk(rows, rows_per_chunk, [&](int64_t begin, int64_t end) {
      const at::Tensor chunk_NC = hidden_NC.slice(0, begin, end);
      const at::Tensor logits_NP = at::mm(chunk_NC, weight_PC.t());
      losses_N.push_back(cross_entropy_gradient_(logits_NP,
                                                 targets_N.slice(0, begin, end),
                                                 weight_VC.size(0),
                                                 l2wrap,
                                                 1 / static_cast<double>(rows)));
      const at::Tensor& dlogits_NP = logits_NP;
      if (dhidden_NC.defined()) {
        at::Tensor dchunk_NC = dhidden_NC.slice(0, begin, end);
        at::mm_out(dchunk_NC, dlogits_NP, weight_PC);
      }
      if (weight_VC.requires_grad()) {
        dweight.add(dlogits_NP, chunk_NC);
      }
    });
    context->save_for_backward(
        {dhidden_NC,
         weight_VC.requires_grad() ? dweight.of_vocabulary(weight_VC.size(0)) : at::Tensor()});
    return at::cat(losses_N).mean();
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    tensor_list gradients = context->get_saved_variables();
    for (at::Tensor& gradient : gradients) {
      if (gradient.defined()) {
        scale_in_fp32(gradient, grads[0]);
      }
    }
    gradients.resize(6);
    return gradients;
  }
};

at::Tensor head_loss_autograd(const at::Tensor& hidden_NC,
                              const at::Tensor& weight_VC,
                              const at::Tensor& targets_N,
                              double l2wrap,
                              int64_t rows_per_chunk,
                              int64_t vocab_multiple) {
  const bool is_needed =
      at::GradMode::is_enabled() && (hidden_NC.requires_grad() || weight_VC.requires_grad());
  if (is_needed) {
    return HeadLossFunction::apply(
        hidden_NC, weight_VC, targets_N, l2wrap, rows_per_chunk, vocab_multiple);
  }
  const at::AutoDispatchBelowAutograd below;
  return head_loss_without_gradient(
      hidden_NC, weight_VC, targets_N, l2wrap, rows_per_chunk, vocab_multiple);
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "head_loss(Tensor hidden, Tensor weight, Tensor targets, float l2wrap, int rows_per_chunk, "
      "int vocab_multiple) -> Tensor");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("head_loss", &head_loss_autograd);
}

// On every device: the kernels are those of cross_entropy.
TORCH_LIBRARY_IMPL(rookery, CompositeExplicitAutograd, library) {
  library.impl("head_loss", &head_loss_without_gradient);
}

}  // namespace

at::Tensor head_loss(const at::Tensor& hidden_NC,
                     const at::Tensor& weight_VC,
                     const at::Tensor& targets_N,
                     const HeadLossSettings& settings) {
  using Op =
      at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&, double, int64_t, int64_t);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("rookery::head_loss", "").typed<Op>();
  check_arguments(hidden_NC, weight_VC, targets_N, settings);
  const int64_t vocab_multiple =
      settings.vocab_multiple.value_or(hidden_NC.is_cuda() ? kCudaMultiple : 1);
  const int64_t row_bytes =
      round_up(weight_VC.size(0), vocab_multiple) * static_cast<int64_t>(hidden_NC.element_size());
  return op.call(
      hidden_NC,
      weight_VC,
      targets_N.contiguous(),
      settings.l2wrap,
      settings.rows_per_chunk.value_or(choose_rows_per_chunk(hidden_NC.size(0), row_bytes)),
      vocab_multiple);
}

}  // namespace rwkv::ops
