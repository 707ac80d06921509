#include "model/ops/layer_norm_shift_mix.h"

#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "model/ops/arguments.h"

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// sum (undefined without delta), last, statistics [B, T, 2] (mean and rstd), mixed.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;
using Forward = ForwardResult(const at::Tensor&,
                              const std::optional<at::Tensor>&,
                              const at::Tensor&,
                              const at::Tensor&,
                              const at::Tensor&,
                              const at::Tensor&,
                              double);
// ds, dweight, dbias, dcarry, dmix.
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Backward = BackwardResult(const at::Tensor&,
                                const at::Tensor&,
                                const at::Tensor&,
                                const at::Tensor&,
                                const at::Tensor&,
                                const at::Tensor&,
                                const std::optional<at::Tensor>&,
                                const std::optional<at::Tensor>&,
                                at::TensorList);

void check_shape(const char* name,
                 const at::Tensor& tensor,
                 at::IntArrayRef expected,
                 const at::Tensor& x_BTC) {
  TORCH_CHECK(tensor.sizes() == expected,
              "layer_norm_shift_mix: ",
              name,
              " is ",
              tensor.sizes(),
              ", expected ",
              expected,
              " for x_BTC ",
              x_BTC.sizes());
  TORCH_CHECK(tensor.scalar_type() == x_BTC.scalar_type(),
              "layer_norm_shift_mix: ",
              name,
              " is ",
              tensor.scalar_type(),
              " but x_BTC is ",
              x_BTC.scalar_type());
}

void check_arguments(const at::Tensor& x_BTC,
                     const at::Tensor& delta_BTC,
                     const at::Tensor& weight_C,
                     const at::Tensor& bias_C,
                     const at::Tensor& carry_BC,
                     const at::Tensor& mix_JC) {
  TORCH_CHECK(x_BTC.dim() == 3 && x_BTC.size(1) >= 1,
              "layer_norm_shift_mix: x_BTC is ",
              x_BTC.sizes(),
              ", expected [B, T, C] with T >= 1");
  const at::ScalarType dtype = x_BTC.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "layer_norm_shift_mix: x_BTC is ",
              dtype,
              ", expected bfloat16, float or double");
  const int64_t batch_size = x_BTC.size(0);
  const int64_t n_embd = x_BTC.size(2);
  if (delta_BTC.defined()) {
    check_shape("delta_BTC", delta_BTC, x_BTC.sizes(), x_BTC);
  }
  check_shape("weight_C", weight_C, {n_embd}, x_BTC);
  check_shape("bias_C", bias_C, {n_embd}, x_BTC);
  check_shape("carry_BC", carry_BC, {batch_size, n_embd}, x_BTC);
  TORCH_CHECK(mix_JC.dim() == 2 && mix_JC.size(0) >= 1,
              "layer_norm_shift_mix: mix_JC is ",
              mix_JC.sizes(),
              ", expected [J, C] with J >= 1");
  check_shape("mix_JC", mix_JC, {mix_JC.size(0), n_embd}, x_BTC);
}

ForwardResult call_forward(const at::Tensor& x_BTC,
                           const std::optional<at::Tensor>& delta_BTC,
                           const at::Tensor& weight_C,
                           const at::Tensor& bias_C,
                           const at::Tensor& carry_BC,
                           const at::Tensor& mix_JC,
                           double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::layer_norm_shift_mix", "")
                             .typed<Forward>();
  return op.call(x_BTC, delta_BTC, weight_C, bias_C, carry_BC, mix_JC, eps);
}

struct LayerNormShiftMixFunction : torch::autograd::Function<LayerNormShiftMixFunction> {
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& x_BTC,
                             const std::optional<at::Tensor>& delta_BTC,
                             const at::Tensor& weight_C,
                             const at::Tensor& bias_C,
                             const at::Tensor& carry_BC,
                             const at::Tensor& mix_JC,
                             double eps) {
    const at::AutoDispatchBelowAutograd below;
    auto [sum_BTC, last_BC, statistics_BT2, mixed_J] =
        call_forward(x_BTC, delta_BTC, weight_C, bias_C, carry_BC, mix_JC, eps);
    const at::Tensor& normalised_from = sum_BTC.defined() ? sum_BTC : x_BTC;
    context->save_for_backward(
        {normalised_from, statistics_BT2, weight_C, bias_C, carry_BC, mix_JC});
    context->saved_data["has_delta"] = delta_BTC.has_value();
    context->set_materialize_grads(false);
    tensor_list outputs{normalised_from, last_BC};
    outputs.insert(outputs.end(), mixed_J.begin(), mixed_J.end());
    return outputs;
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::layer_norm_shift_mix_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    tensor_list dmixed_J;
    for (size_t i = 2; i < grads.size(); ++i) {
      dmixed_J.push_back(grads[i].defined() ? grads[i].contiguous() : at::zeros_like(saved[0]));
    }
    auto [ds_BTC, dweight_C, dbias_C, dcarry_BC, dmix_JC] = op.call(saved[0],
                                                                    saved[1],
                                                                    saved[2],
                                                                    saved[3],
                                                                    saved[4],
                                                                    saved[5],
                                                                    if_defined(grads[0]),
                                                                    if_defined(grads[1]),
                                                                    dmixed_J);
    const at::Tensor ddelta_BTC = context->saved_data["has_delta"].toBool() ? ds_BTC : at::Tensor();
    return {ds_BTC, ddelta_BTC, dweight_C, dbias_C, dcarry_BC, dmix_JC, at::Tensor()};
  }
};

ForwardResult layer_norm_shift_mix_autograd(const at::Tensor& x_BTC,
                                            const std::optional<at::Tensor>& delta_BTC,
                                            const at::Tensor& weight_C,
                                            const at::Tensor& bias_C,
                                            const at::Tensor& carry_BC,
                                            const at::Tensor& mix_JC,
                                            double eps) {
  const tensor_list outputs =
      LayerNormShiftMixFunction::apply(x_BTC, delta_BTC, weight_C, bias_C, carry_BC, mix_JC, eps);
  return {outputs[0], outputs[1], at::Tensor(), {outputs.begin() + 2, outputs.end()}};
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "layer_norm_shift_mix(Tensor x, Tensor? delta, Tensor weight, Tensor bias, Tensor carry, "
      "Tensor mix, float eps) -> (Tensor, Tensor, Tensor, Tensor[])");
  library.def(
      "layer_norm_shift_mix_backward(Tensor sum, Tensor statistics, Tensor weight, Tensor bias, "
      "Tensor carry, Tensor mix, Tensor? dsum, Tensor? dlast, Tensor[] dmixed) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("layer_norm_shift_mix", &layer_norm_shift_mix_autograd);
}

}  // namespace

LayerNormShiftMixOutput layer_norm_shift_mix(const at::Tensor& x_BTC,
                                             const at::Tensor& delta_BTC,
                                             const at::Tensor& weight_C,
                                             const at::Tensor& bias_C,
                                             const at::Tensor& carry_BC,
                                             const at::Tensor& mix_JC,
                                             double eps) {
  check_arguments(x_BTC, delta_BTC, weight_C, bias_C, carry_BC, mix_JC);
  const at::Tensor x = x_BTC.contiguous();
  auto [sum_BTC, last_BC, statistics_BT2, mixed_J] = call_forward(x,
                                                                  if_defined(delta_BTC),
                                                                  weight_C.contiguous(),
                                                                  bias_C.contiguous(),
                                                                  carry_BC.contiguous(),
                                                                  mix_JC.contiguous(),
                                                                  eps);
  // Below autograd the kernel leaves the sum out where it would be x.
  return {sum_BTC.defined() ? sum_BTC : x, last_BC, std::move(mixed_J)};
}

}  // namespace rwkv::ops
