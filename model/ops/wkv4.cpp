#include "model/ops/wkv4.h"

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

void check_shapes(const at::Tensor& w_log_A,
                  const at::Tensor& k_BTA,
                  const at::Tensor& v_BTA,
                  const at::Tensor& u_A,
                  const at::Tensor& state_B3A,
                  const at::Tensor& r_BTA) {
  TORCH_CHECK(k_BTA.dim() == 3, "wkv4: k_BTA is ", k_BTA.sizes(), ", expected [B, T, A]");
  TORCH_CHECK(v_BTA.sizes() == k_BTA.sizes(),
              "wkv4: v_BTA is ",
              v_BTA.sizes(),
              " but k_BTA is ",
              k_BTA.sizes());
  TORCH_CHECK(!r_BTA.defined() || r_BTA.sizes() == k_BTA.sizes(),
              "wkv4: r_BTA is ",
              r_BTA.sizes(),
              " but k_BTA is ",
              k_BTA.sizes());
  const int64_t batch_size = k_BTA.size(0);
  const int64_t dim_att = k_BTA.size(2);
  TORCH_CHECK(w_log_A.sizes() == at::IntArrayRef({dim_att}),
              "wkv4: w_log_A is ",
              w_log_A.sizes(),
              " but k_BTA is ",
              k_BTA.sizes());
  TORCH_CHECK(u_A.sizes() == at::IntArrayRef({dim_att}),
              "wkv4: u_A is ",
              u_A.sizes(),
              " but k_BTA is ",
              k_BTA.sizes());
  TORCH_CHECK(state_B3A.sizes() == at::IntArrayRef({batch_size, 3, dim_att}),
              "wkv4: state_B3A is ",
              state_B3A.sizes(),
              ", expected [",
              batch_size,
              ", 3, ",
              dim_att,
              "] for k_BTA ",
              k_BTA.sizes());
}

void check_dtypes(const at::Tensor& w_log_A,
                  const at::Tensor& k_BTA,
                  const at::Tensor& v_BTA,
                  const at::Tensor& u_A,
                  const at::Tensor& state_B3A,
                  const at::Tensor& r_BTA) {
  const at::ScalarType inputs = k_BTA.scalar_type();
  TORCH_CHECK(inputs == at::kBFloat16 || inputs == at::kFloat || inputs == at::kDouble,
              "wkv4: k_BTA is ",
              inputs,
              ", expected bfloat16, float or double");
  TORCH_CHECK(v_BTA.scalar_type() == inputs,
              "wkv4: v_BTA is ",
              v_BTA.scalar_type(),
              " but k_BTA is ",
              inputs);
  TORCH_CHECK(!r_BTA.defined() || r_BTA.scalar_type() == inputs,
              "wkv4: r_BTA is ",
              r_BTA.scalar_type(),
              " but k_BTA is ",
              inputs);
  const at::ScalarType exact = exact_type(inputs);
  for (const at::Tensor& tensor : {w_log_A, u_A, state_B3A}) {
    TORCH_CHECK(tensor.scalar_type() == exact,
                "wkv4: w_log_A, u_A and state_B3A must be ",
                exact,
                " where k_BTA is ",
                inputs,
                "; one of them is ",
                tensor.scalar_type());
  }
}

// y, the state after the last token, and what the device's backward wants of forward.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResult call_forward(const at::Tensor& w_log_A,
                           const at::Tensor& k_BTA,
                           const at::Tensor& v_BTA,
                           const at::Tensor& u_A,
                           const at::Tensor& state_B3A,
                           const std::optional<at::Tensor>& r_BTA,
                           const std::optional<at::Tensor>& starts_BT) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::wkv4", "")
                             .typed<ForwardResult(const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const std::optional<at::Tensor>&,
                                                  const std::optional<at::Tensor>&)>();
  return op.call(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA, starts_BT);
}

struct Wkv4Function : torch::autograd::Function<Wkv4Function> {
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& w_log_A,
                             const at::Tensor& k_BTA,
                             const at::Tensor& v_BTA,
                             const at::Tensor& u_A,
                             const at::Tensor& state_B3A,
                             const std::optional<at::Tensor>& r_BTA,
                             const std::optional<at::Tensor>& starts_BT) {
    const at::AutoDispatchBelowAutograd below;
    auto [y_BTA, state_out_B3A, carries] =
        call_forward(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA, starts_BT);
    context->save_for_backward({w_log_A,
                                k_BTA,
                                v_BTA,
                                u_A,
                                state_B3A,
                                r_BTA.value_or(at::Tensor()),
                                starts_BT.value_or(at::Tensor()),
                                carries});
    context->mark_non_differentiable({carries});
    context->set_materialize_grads(false);
    return {y_BTA, state_out_B3A, carries};
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Result =
        std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    using Backward = Result(const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::wkv4_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    const at::Tensor dy_BTA = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(saved[1]);
    auto [dw_A, dk_BTA, dv_BTA, du_A, dstate_in_B3A, dr_BTA] = op.call(saved[0],
                                                                       saved[1],
                                                                       saved[2],
                                                                       saved[3],
                                                                       saved[4],
                                                                       if_defined(saved[5]),
                                                                       if_defined(saved[6]),
                                                                       saved[7],
                                                                       dy_BTA,
                                                                       if_defined(grads[1]));
    return {dw_A, dk_BTA, dv_BTA, du_A, dstate_in_B3A, dr_BTA, at::Tensor()};
  }
};

ForwardResult wkv4_autograd(const at::Tensor& w_log_A,
                            const at::Tensor& k_BTA,
                            const at::Tensor& v_BTA,
                            const at::Tensor& u_A,
                            const at::Tensor& state_B3A,
                            const std::optional<at::Tensor>& r_BTA,
                            const std::optional<at::Tensor>& starts_BT) {
  const tensor_list output =
      Wkv4Function::apply(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA, starts_BT);
  return {output[0], output[1], output[2]};
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "wkv4(Tensor w_log, Tensor k, Tensor v, Tensor u, Tensor state, Tensor? r, Tensor? starts) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "wkv4_backward(Tensor w_log, Tensor k, Tensor v, Tensor u, Tensor state, Tensor? r, "
      "Tensor? starts, Tensor carries, Tensor dy, Tensor? dstate_out) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("wkv4", &wkv4_autograd);
}

}  // namespace

Wkv4Output wkv4(const at::Tensor& w_log_A,
                const at::Tensor& k_BTA,
                const at::Tensor& v_BTA,
                const at::Tensor& u_A,
                const at::Tensor& state_B3A,
                const at::Tensor& r_BTA,
                const at::Tensor& starts_BT) {
  check_shapes(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA);
  check_dtypes(w_log_A, k_BTA, v_BTA, u_A, state_B3A, r_BTA);
  check_starts("wkv4", {"starts_BT", starts_BT}, {"k_BTA", k_BTA});
  auto [y_BTA, state_out_B3A, carries] = call_forward(w_log_A.contiguous(),
                                                      k_BTA.contiguous(),
                                                      v_BTA.contiguous(),
                                                      u_A.contiguous(),
                                                      state_B3A.contiguous(),
                                                      if_defined(r_BTA),
                                                      if_defined(starts_BT));
  return {y_BTA, state_out_B3A};
}

at::Tensor wkv4_initial_state(int64_t batch_size,
                              int64_t dim_att,
                              const at::TensorOptions& options) {
  at::Tensor state_B3A = at::zeros({batch_size, 3, dim_att}, options);
  state_B3A.select(1, 2).fill_(kLogOfNothing);
  return state_B3A;
}

}  // namespace rwkv::ops
