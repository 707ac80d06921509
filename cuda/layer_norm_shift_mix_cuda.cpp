// layer_norm_shift_mix on CUDA: tensors to pointers.
#include <optional>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/layer_norm_shift_mix_kernel.h"

namespace rwkv {
namespace {

LayerNormShiftMixSizes sizes_of(const at::Tensor& x_BTC, const at::Tensor& mix_JC) {
  TORCH_CHECK(mix_JC.size(0) <= kMaxMixes && x_BTC.size(2) <= kMaxChannels,
              "layer_norm_shift_mix: ",
              mix_JC.size(0),
              " mixes of ",
              x_BTC.size(2),
              " channels, expected at most ",
              kMaxMixes,
              " of ",
              kMaxChannels,
              " on CUDA");
  return {.batch_size = x_BTC.size(0),
          .seq_len = x_BTC.size(1),
          .n_embd = x_BTC.size(2),
          .num_mixes = static_cast<int>(mix_JC.size(0))};
}

std::vector<at::Tensor> empty_mixes(const at::Tensor& x_BTC, const at::Tensor& mix_JC) {
  std::vector<at::Tensor> mixed_J;
  for (int64_t j = 0; j < mix_JC.size(0); ++j) {
    mixed_J.push_back(at::empty_like(x_BTC));
  }
  return mixed_J;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>> forward(
    const at::Tensor& x_BTC,
    const std::optional<at::Tensor>& delta_BTC,
    const at::Tensor& weight_C,
    const at::Tensor& bias_C,
    const at::Tensor& carry_BC,
    const at::Tensor& mix_JC,
    double eps) {
  const at::Tensor sum_BTC = delta_BTC ? at::empty_like(x_BTC) : at::Tensor();
  const at::Tensor last_BC = at::empty_like(carry_BC);
  const at::Tensor statistics_BT2 =
      at::empty({x_BTC.size(0), x_BTC.size(1), 2}, x_BTC.options().dtype(at::kFloat));
  const std::vector<at::Tensor> mixed_J = empty_mixes(x_BTC, mix_JC);
  with_element("layer_norm_shift_mix", x_BTC, [&](auto element) {
    using Element = decltype(element);
    LayerNormShiftMixForward<Element> arguments{
        .sizes = sizes_of(x_BTC, mix_JC),
        .eps = static_cast<float>(eps),
        .x = pointer<Element>(x_BTC),
        .delta = pointer<Element>(delta_BTC),
        .weight = pointer<Element>(weight_C),
        .bias = pointer<Element>(bias_C),
        .carry = pointer<Element>(carry_BC),
        .mix = pointer<Element>(mix_JC),
        .sum = mutable_pointer<Element>(sum_BTC),
        .last = mutable_pointer<Element>(last_BC),
        .statistics = mutable_pointer<float>(statistics_BT2)};
    for (size_t j = 0; j < mixed_J.size(); ++j) {
      arguments.mixed[j] = mutable_pointer<Element>(mixed_J[j]);
    }
    RWKV_CUDA_CHECK(launch_layer_norm_shift_mix(arguments, current_stream()),
                    "layer_norm_shift_mix of ",
                    x_BTC.sizes());
  });
  return {sum_BTC, last_BC, statistics_BT2, mixed_J};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& sum_BTC,
    const at::Tensor& statistics_BT2,
    const at::Tensor& weight_C,
    const at::Tensor& bias_C,
    const at::Tensor& carry_BC,
    const at::Tensor& mix_JC,
    const std::optional<at::Tensor>& dsum_BTC,
    const std::optional<at::Tensor>& dlast_BC,
    at::TensorList dmixed_J) {
  const at::Tensor ds_BTC = at::empty_like(sum_BTC);
  const at::Tensor dweight_C = at::empty_like(weight_C), dbias_C = at::empty_like(bias_C);
  const at::Tensor dcarry_BC = at::empty_like(carry_BC), dmix_JC = at::empty_like(mix_JC);
  const LayerNormShiftMixSizes sizes = sizes_of(sum_BTC, mix_JC);
  const at::Tensor scratch =
      at::empty({layer_norm_shift_mix_scratch_size(sizes)}, sum_BTC.options().dtype(at::kFloat));
  with_element("layer_norm_shift_mix backward", sum_BTC, [&](auto element) {
    using Element = decltype(element);
    LayerNormShiftMixBackward<Element> arguments{.sizes = sizes,
                                                 .sum = pointer<Element>(sum_BTC),
                                                 .statistics = pointer<float>(statistics_BT2),
                                                 .weight = pointer<Element>(weight_C),
                                                 .bias = pointer<Element>(bias_C),
                                                 .carry = pointer<Element>(carry_BC),
                                                 .mix = pointer<Element>(mix_JC),
                                                 .dsum = pointer<Element>(dsum_BTC),
                                                 .dlast = pointer<Element>(dlast_BC)};
    for (size_t j = 0; j < dmixed_J.size(); ++j) {
      arguments.dmixed[j] = pointer<Element>(dmixed_J[j]);
    }
    arguments.ds = mutable_pointer<Element>(ds_BTC);
    arguments.dweight = mutable_pointer<Element>(dweight_C);
    arguments.dbias = mutable_pointer<Element>(dbias_C);
    arguments.dcarry = mutable_pointer<Element>(dcarry_BC);
    arguments.dmix = mutable_pointer<Element>(dmix_JC);
    arguments.scratch = mutable_pointer<float>(scratch);
    RWKV_CUDA_CHECK(launch_layer_norm_shift_mix_backward(arguments, current_stream()),
                    "layer_norm_shift_mix backward of ",
                    sum_BTC.sizes());
  });
  return {ds_BTC, dweight_C, dbias_C, dcarry_BC, dmix_JC};
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("layer_norm_shift_mix", &forward);
  library.impl("layer_norm_shift_mix_backward", &backward);
}

}  // namespace
}  // namespace rwkv
