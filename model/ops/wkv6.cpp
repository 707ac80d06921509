#include "model/ops/wkv6.h"

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
using OptionalTensor = std::optional<at::Tensor>;

void check(const Wkv6Inputs& in,
           const at::Tensor& w0_C,
           const at::Tensor& u_C,
           const at::Tensor& state_BHNN,
           const at::Tensor& starts_BT) {
  const Argument r{"r_BTC", in.r_BTC};
  check_sequence("wkv6", r);
  if (in.w_raw_BTC.defined()) {
    check_like("wkv6", {"w_raw_BTC", in.w_raw_BTC}, r);
  }
  check_like("wkv6", {"k_BTC", in.k_BTC}, r);
  check_like("wkv6", {"v_BTC", in.v_BTC}, r);
  const at::ScalarType exact = exact_type(in.r_BTC.scalar_type());
  check_vector("wkv6", {"w0_C", w0_C}, exact, r);
  check_vector("wkv6", {"u_C", u_C}, exact, r);
  check_head_state("wkv6", {"state_BHNN", state_BHNN}, r);
  check_starts("wkv6", {"starts_BT", starts_BT}, r);
}

// y, the state after the last token, and the states that backward starts from.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResult call_forward(const at::Tensor& r_BTC,
                           const OptionalTensor& w_raw_BTC,
                           const at::Tensor& k_BTC,
                           const at::Tensor& v_BTC,
                           const at::Tensor& w0_C,
                           const at::Tensor& u_C,
                           const at::Tensor& state_BHNN,
                           const OptionalTensor& starts_BT,
                           bool for_backward) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::wkv6", "")
                             .typed<ForwardResult(const at::Tensor&,
                                                  const OptionalTensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const OptionalTensor&,
                                                  bool)>();
  return op.call(r_BTC, w_raw_BTC, k_BTC, v_BTC, w0_C, u_C, state_BHNN, starts_BT, for_backward);
}

struct Wkv6Function : torch::autograd::Function<Wkv6Function> {
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& r_BTC,
                             const OptionalTensor& w_raw_BTC,
                             const at::Tensor& k_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& w0_C,
                             const at::Tensor& u_C,
                             const at::Tensor& state_BHNN,
                             const OptionalTensor& starts_BT) {
    const at::AutoDispatchBelowAutograd below;
    auto [y_BTC, state_out_BHNN, states] = call_forward(r_BTC,
                                                        w_raw_BTC,
                                                        k_BTC,
                                                        v_BTC,
                                                        w0_C,
                                                        u_C,
                                                        state_BHNN,
                                                        starts_BT,
                                                        /*for_backward=*/true);
    context->save_for_backward({r_BTC,
                                w_raw_BTC.value_or(at::Tensor()),
                                k_BTC,
                                v_BTC,
                                w0_C,
                                u_C,
                                states,
                                starts_BT.value_or(at::Tensor())});
    context->mark_non_differentiable({states});
    context->set_materialize_grads(false);
    return {y_BTC, state_out_BHNN, states};
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Result = std::
        tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    using Backward = Result(const at::Tensor&,
                            const OptionalTensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const OptionalTensor&,
                            const at::Tensor&,
                            const OptionalTensor&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::wkv6_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    const at::Tensor dy_BTC = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(saved[0]);
    auto [dr, dw_raw, dk, dv, dw0, du, dstate_in] = op.call(saved[0],
                                                            if_defined(saved[1]),
                                                            saved[2],
                                                            saved[3],
                                                            saved[4],
                                                            saved[5],
                                                            saved[6],
                                                            if_defined(saved[7]),
                                                            dy_BTC,
                                                            if_defined(grads[1]));
    return {
        dr, saved[1].defined() ? dw_raw : at::Tensor(), dk, dv, dw0, du, dstate_in, at::Tensor()};
  }
};

ForwardResult wkv6_autograd(const at::Tensor& r_BTC,
                            const OptionalTensor& w_raw_BTC,
                            const at::Tensor& k_BTC,
                            const at::Tensor& v_BTC,
                            const at::Tensor& w0_C,
                            const at::Tensor& u_C,
                            const at::Tensor& state_BHNN,
                            const OptionalTensor& starts_BT,
                            bool for_backward) {
  if (!for_backward) {
    const at::AutoDispatchBelowAutograd below;
    return call_forward(r_BTC, w_raw_BTC, k_BTC, v_BTC, w0_C, u_C, state_BHNN, starts_BT, false);
  }
  const tensor_list output =
      Wkv6Function::apply(r_BTC, w_raw_BTC, k_BTC, v_BTC, w0_C, u_C, state_BHNN, starts_BT);
  return {output[0], output[1], output[2]};
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "wkv6(Tensor r, Tensor? w_raw, Tensor k, Tensor v, Tensor w0, Tensor u, Tensor state, "
      "Tensor? starts, bool for_backward) -> (Tensor, Tensor, Tensor)");
  library.def(
      "wkv6_backward(Tensor r, Tensor? w_raw, Tensor k, Tensor v, Tensor w0, Tensor u, "
      "Tensor states, Tensor? starts, Tensor dy, Tensor? dstate_out) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("wkv6", &wkv6_autograd);
}

}  // namespace

Wkv6Output wkv6(const Wkv6Inputs& inputs,
                const at::Tensor& w0_C,
                const at::Tensor& u_C,
                const at::Tensor& state_BHNN,
                const at::Tensor& starts_BT) {
  check(inputs, w0_C, u_C, state_BHNN, starts_BT);
  if (inputs.r_BTC.size(1) == 0) {
    return {at::empty_like(inputs.r_BTC), state_BHNN};
  }
  bool needs_gradient = false;
  for (const at::Tensor& tensor :
       {inputs.r_BTC, inputs.w_raw_BTC, inputs.k_BTC, inputs.v_BTC, w0_C, u_C, state_BHNN}) {
    needs_gradient = needs_gradient || (tensor.defined() && tensor.requires_grad());
  }
  auto [y_BTC, state_out_BHNN, states] = call_forward(inputs.r_BTC.contiguous(),
                                                      if_defined(inputs.w_raw_BTC),
                                                      inputs.k_BTC.contiguous(),
                                                      inputs.v_BTC.contiguous(),
                                                      w0_C.contiguous(),
                                                      u_C.contiguous(),
                                                      state_BHNN.contiguous(),
                                                      if_defined(starts_BT),
                                                      at::GradMode::is_enabled() && needs_gradient);
  return {y_BTC, state_out_BHNN};
}

}  // namespace rwkv::ops
