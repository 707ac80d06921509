#include "model/ops/wkv7.h"

#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

void check(const Wkv7Inputs& in,
           const at::Tensor& w0_C,
           const at::Tensor& state_BHNN,
           const at::Tensor& starts_BT) {
  const at::Tensor& r = in.r_BTC;
  TORCH_CHECK(r.dim() == 3, "wkv7: r_BTC is ", r.sizes(), ", expected [B, T, C]");
  const at::ScalarType dtype = r.scalar_type();
  TORCH_CHECK(dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble,
              "wkv7: r_BTC is ",
              dtype,
              ", expected bfloat16, float or double");
  const std::pair<const char*, const at::Tensor&> others[] = {{"w_raw_BTC", in.w_raw_BTC},
                                                              {"k_BTC", in.k_BTC},
                                                              {"v_BTC", in.v_BTC},
                                                              {"a_BTC", in.a_BTC},
                                                              {"b_BTC", in.b_BTC}};
  for (const auto& [name, tensor] : others) {
    TORCH_CHECK(tensor.sizes() == r.sizes() && tensor.scalar_type() == dtype,
                "wkv7: ",
                name,
                " is ",
                tensor.scalar_type(),
                " ",
                tensor.sizes(),
                " but r_BTC is ",
                dtype,
                " ",
                r.sizes());
  }
  const at::ScalarType exact = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t n_embd = r.size(2);
  TORCH_CHECK(w0_C.sizes() == at::IntArrayRef({n_embd}) && w0_C.scalar_type() == exact,
              "wkv7: w0_C is ",
              w0_C.scalar_type(),
              " ",
              w0_C.sizes(),
              ", expected ",
              exact,
              " [",
              n_embd,
              "] for r_BTC ",
              r.sizes());
  TORCH_CHECK(state_BHNN.dim() == 4 && state_BHNN.size(0) == r.size(0) &&
                  state_BHNN.size(2) == state_BHNN.size(3) &&
                  state_BHNN.size(1) * state_BHNN.size(2) == n_embd &&
                  state_BHNN.scalar_type() == exact,
              "wkv7: state_BHNN is ",
              state_BHNN.scalar_type(),
              " ",
              state_BHNN.sizes(),
              ", expected ",
              exact,
              " [",
              r.size(0),
              ", H, N, N] with H N = ",
              n_embd,
              " for r_BTC ",
              r.sizes());
  TORCH_CHECK(!starts_BT.defined() || (starts_BT.sizes() == r.sizes().slice(0, 2) &&
                                       starts_BT.scalar_type() == at::kBool),
              "wkv7: starts_BT is ",
              starts_BT.scalar_type(),
              " ",
              starts_BT.sizes(),
              ", expected Bool [B, T] for r_BTC ",
              r.sizes());
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
    const std::optional<at::Tensor> starts_BT =
        saved[9].defined() ? std::optional(saved[9]) : std::nullopt;
    const std::optional<at::Tensor> dstate_BHNN =
        grads[1].defined() ? std::optional(grads[1].contiguous()) : std::nullopt;
    auto [dr, dw_raw, dk, dv, da, db, dw0, dstate_in] = op.call(saved[0],
                                                                saved[1],
                                                                saved[2],
                                                                saved[3],
                                                                saved[4],
                                                                saved[5],
                                                                saved[6],
                                                                saved[7],
                                                                saved[8],
                                                                starts_BT,
                                                                dy_BTC,
                                                                dstate_BHNN);
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
                   starts_BT.defined() ? std::optional(starts_BT.contiguous()) : std::nullopt,
                   at::GradMode::is_enabled() && needs_gradient);
  return {y_BTC, state_out_BHNN};
}

}  // namespace rwkv::ops
