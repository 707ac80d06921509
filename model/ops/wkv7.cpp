#include "model/ops/wkv7.h"

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

void check(const Wkv7Inputs& in,
           const at::Tensor& w0_C,
           const at::Tensor& state_BHNN,
           const at::Tensor& starts_BT) {
  const Argument r{"r_BTC", in.r_BTC};
  check_sequence("wkv7", r);
  for (const Argument& argument : {Argument{"w_raw_BTC", in.w_raw_BTC},
                                   Argument{"k_BTC", in.k_BTC},
                                   Argument{"v_BTC", in.v_BTC},
                                   Argument{"a_BTC", in.a_BTC},
                                   Argument{"b_BTC", in.b_BTC}}) {
    check_like("wkv7", argument, r);
  }
  check_vector("wkv7", {"w0_C", w0_C}, exact_type(in.r_BTC.scalar_type()), r);
  check_head_state("wkv7", {"state_BHNN", state_BHNN}, r);
  check_starts("wkv7", {"starts_BT", starts_BT}, r);
}

// y, the state after the last token, and what the device's backward wants of forward.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult call_forward(const at::Tensor& r_BTC,
                           const at::Tensor& w_raw_BTC,
                           const at::Tensor& k_BTC,
                           const at::Tensor& v_BTC,
                           const at::Tensor& a_BTC,
                           const at::Tensor& b_BTC,
                           const at::Tensor& w0_C,
                           const at::Tensor& state_BHNN,
                           const std::optional<at::Tensor>& starts_BT,
                           bool for_backward) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::wkv7", "")
                             .typed<ForwardResult(const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const std::optional<at::Tensor>&,
                                                  bool)>();
  return op.call(
      r_BTC, w_raw_BTC, k_BTC, v_BTC, a_BTC, b_BTC, w0_C, state_BHNN, starts_BT, for_backward);
}

struct Wkv7Function : torch::autograd::Function<Wkv7Function> {
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& r_BTC,
                             const at::Tensor& w_raw_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& a_BTC,
                             const at::Tensor& b_BTC,
                             const at::Tensor& w0_C,
                             const at::Tensor& state_BHNN,
                             const std::optional<at::Tensor>& starts_BT) {
    const at::AutoDispatchBelowAutograd below;
    auto [y_BTC, state_out_BHNN, u_BTC, states] = call_forward(r_BTC,
                                                               w_raw_BTC,
                                                               k_BTC,
                                                               v_BTC,
                                                               a_BTC,
                                                               b_BTC,
                                                               w0_C,
                                                               state_BHNN,
                                                               starts_BT,
                                                               /*for_backward=*/true);
    context->save_for_backward({r_BTC,
                                w_raw_BTC,
                                k_BTC,
                                v_BTC,
                                a_BTC,
                                b_BTC,
                                w0_C,
                                u_BTC,
                                states,
                                starts_BT.value_or(at::Tensor())});
    context->mark_non_differentiable({u_BTC, states});
    context->set_materialize_grads(false);
    return {y_BTC, state_out_BHNN, u_BTC, states};
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Result = std::tuple<at::Tensor,
                              at::Tensor,
                              at::Tensor,
                              at::Tensor,
                              at::Tensor,
                              at::Tensor,
                              at::Tensor,
                              at::Tensor>;
    using Backward = Result(const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::wkv7_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    const at::Tensor dy_BTC = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(saved[0]);
    auto [dr, dw_raw, dk, dv, da, db, dw0, dstate_in] = op.call(saved[0],
                                                                saved[1],
                                                                saved[2],
                                                                saved[3],
                                                                saved[4],
                                                                saved[5],
                                                                saved[6],
                                                                saved[7],
                                                                saved[8],
                                                                if_defined(saved[9]),
                                                                dy_BTC,
                                                                if_defined(grads[1]));
    return {dr, dw_raw, dk, dv, da, db, dw0, dstate_in, at::Tensor()};
  }
};

ForwardResult wkv7_autograd(const at::Tensor& r_BTC,
                            const at::Tensor& w_raw_BTC,
                            const at::Tensor& k_BTC,
                            const at::Tensor& v_BTC,
                            const at::Tensor& a_BTC,
                            const at::Tensor& b_BTC,
                            const at::Tensor& w0_C,
                            const at::Tensor& state_BHNN,
                            const std::optional<at::Tensor>& starts_BT,
                            bool for_backward) {
  if (!for_backward) {
    const at::AutoDispatchBelowAutograd below;
    return call_forward(
        r_BTC, w_raw_BTC, k_BTC, v_BTC, a_BTC, b_BTC, w0_C, state_BHNN, starts_BT, false);
  }
  const tensor_list output = Wkv7Function::apply(
      r_BTC, w_raw_BTC, k_BTC, v_BTC, a_BTC, b_BTC, w0_C, state_BHNN, starts_BT);
  return {output[0], output[1], output[2], output[3]};
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "wkv7(Tensor r, Tensor w_raw, Tensor k, Tensor v, Tensor a, Tensor b, Tensor w0, "
      "Tensor state, Tensor? starts, bool for_backward) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "wkv7_backward(Tensor r, Tensor w_raw, Tensor k, Tensor v, Tensor a, Tensor b, Tensor w0, "
      "Tensor u, Tensor states, Tensor? starts, Tensor dy, Tensor? dstate_out) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("wkv7", &wkv7_autograd);
}

}  // namespace

Wkv7Output wkv7(const Wkv7Inputs& inputs,
                const at::Tensor& w0_C,
                const at::Tensor& state_BHNN,
                const at::Tensor& starts_BT) {
  check(inputs, w0_C, state_BHNN, starts_BT);
  if (inputs.r_BTC.size(1) == 0) {
    return {at::empty_like(inputs.r_BTC), state_BHNN};
  }
  bool needs_gradient = w0_C.requires_grad() || state_BHNN.requires_grad();
  for (const at::Tensor& tensor :
       {inputs.r_BTC, inputs.w_raw_BTC, inputs.k_BTC, inputs.v_BTC, inputs.a_BTC, inputs.b_BTC}) {
    needs_gradient = needs_gradient || tensor.requires_grad();
  }
  auto [y_BTC, state_out_BHNN, u_BTC, states] =
      call_forward(inputs.r_BTC.contiguous(),
                   inputs.w_raw_BTC.contiguous(),
                   inputs.k_BTC.contiguous(),
                   inputs.v_BTC.contiguous(),
                   inputs.a_BTC.contiguous(),
                   inputs.b_BTC.contiguous(),
                   w0_C.contiguous(),
                   state_BHNN.contiguous(),
                   if_defined(starts_BT),
                   at::GradMode::is_enabled() && needs_gradient);
  return {y_BTC, state_out_BHNN};
}

}  // namespace rwkv::ops
