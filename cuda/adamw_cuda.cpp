// adamw_ and its numbers on CUDA: tensors to pointers.
#include <optional>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/adamw_kernel.h"
#include "cuda/device.h"
#include "model/ops/adamw.h"

namespace rwkv {
namespace {

static_assert(sizeof(AdamwNumbers) == ops::kControlSize * sizeof(double));
static_assert(kMaxAdamwRanges == ops::kMaxAdamwGroups);

void add_sum_of_squares(const at::Tensor& tensor, at::Tensor& sum) {
  const int64_t size = tensor.numel();
  const at::Tensor scratch =
      at::empty({sum_of_squares_scratch_size(size)}, tensor.options().dtype(at::kDouble));
  with_element("add_sum_of_squares", tensor, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_add_sum_of_squares(pointer<Element>(tensor),
                                              size,
                                              mutable_pointer<double>(scratch),
                                              mutable_pointer<double>(sum),
                                              current_stream()),
                    "add_sum_of_squares of ",
                    tensor.sizes());
  });
}

void begin_adamw(at::Tensor& control,
                 const at::Tensor& sum_of_squares,
                 const at::Tensor& loss,
                 double clip_norm) {
  RWKV_CUDA_CHECK(launch_begin_adamw(mutable_pointer<AdamwNumbers>(control),
                                     pointer<double>(sum_of_squares),
                                     pointer<double>(loss),
                                     clip_norm,
                                     current_stream()),
                  "begin_adamw");
}

AdamwRanges ranges_of(at::IntArrayRef bounds,
                      at::ArrayRef<double> lr_scales,
                      at::ArrayRef<double> weight_decays) {
  AdamwRanges ranges{.count = static_cast<int>(lr_scales.size()), .ranges = {}};
  for (size_t i = 0; i < lr_scales.size(); ++i) {
    ranges.ranges[i] = {.begin = bounds[2 * i],
                        .end = bounds[2 * i + 1],
                        .lr_scale = lr_scales[i],
                        .weight_decay = weight_decays[i]};
  }
  return ranges;
}

void adamw(const std::optional<at::Tensor>& master,
           const std::optional<at::Tensor>& weights,
           const std::optional<at::Tensor>& low,
           at::Tensor& m,
           at::Tensor& v,
           const at::Tensor& gradient,
           at::IntArrayRef bounds,
           at::ArrayRef<double> lr_scales,
           at::ArrayRef<double> weight_decays,
           const at::Tensor& control,
           double beta1,
           double beta2,
           double eps) {
  with_element("adamw_", gradient, [&](auto element) {
    using Gradient = decltype(element);
    const AdamwUpdate<Gradient> arguments{
        .master = mutable_pointer<float>(master.value_or(at::Tensor())),
        .weights = mutable_pointer<__nv_bfloat16>(weights.value_or(at::Tensor())),
        .low = mutable_pointer<int16_t>(low.value_or(at::Tensor())),
        .m = mutable_pointer<float>(m),
        .v = mutable_pointer<float>(v),
        .gradient = pointer<Gradient>(gradient),
        .ranges = ranges_of(bounds, lr_scales, weight_decays),
        .factors = {.beta1 = beta1, .beta2 = beta2, .eps = eps},
        .numbers = pointer<AdamwNumbers>(control)};
    RWKV_CUDA_CHECK(launch_adamw(arguments, current_stream()), "adamw_ of ", m.sizes());
  });
}

void split_master(const at::Tensor& master, at::Tensor& weights, at::Tensor& low) {
  RWKV_CUDA_CHECK(launch_split_master(pointer<float>(master),
                                      mutable_pointer<__nv_bfloat16>(weights),
                                      mutable_pointer<int16_t>(low),
                                      master.numel(),
                                      current_stream()),
                  "split_master of ",
                  master.sizes());
}

at::Tensor join_master(const at::Tensor& weights, const at::Tensor& low) {
  at::Tensor master = at::empty(weights.sizes(), weights.options().dtype(at::kFloat));
  RWKV_CUDA_CHECK(launch_join_master(pointer<__nv_bfloat16>(weights),
                                     pointer<int16_t>(low),
                                     mutable_pointer<float>(master),
                                     master.numel(),
                                     current_stream()),
                  "join_master of ",
                  weights.sizes());
  return master;
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("add_sum_of_squares", &add_sum_of_squares);
  library.impl("begin_adamw", &begin_adamw);
  library.impl("adamw_", &adamw);
  library.impl("split_master", &split_master);
  library.impl("join_master", &join_master);
}

}  // namespace
}  // namespace rwkv
