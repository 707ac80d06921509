#include "model/ops/wkv7_inputs.h"

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

// k', v', a, b; v' is undefined in the first layer.
using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

ForwardResult call_forward(const at::Tensor& k_BTC,
                           const at::Tensor& a_raw_BTC,
                           const at::Tensor& v_BTC,
                           const std::optional<at::Tensor>& v_raw_BTC,
                           const std::optional<at::Tensor>& v_first_BTC,
                           const at::Tensor& k_k_C,
                           const at::Tensor& k_a_C,
                           int64_t head_size) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::wkv7_inputs", "")
                             .typed<ForwardResult(const at::Tensor&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  const std::optional<at::Tensor>&,
                                                  const std::optional<at::Tensor>&,
                                                  const at::Tensor&,
                                                  const at::Tensor&,
                                                  int64_t)>();
  return op.call(k_BTC, a_raw_BTC, v_BTC, v_raw_BTC, v_first_BTC, k_k_C, k_a_C, head_size);
}

struct Wkv7InputsFunction : torch::autograd::Function<Wkv7InputsFunction> {
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& k_BTC,
                             const at::Tensor& a_raw_BTC,
                             const at::Tensor& v_BTC,
                             const std::optional<at::Tensor>& v_raw_BTC,
                             const std::optional<at::Tensor>& v_first_BTC,
                             const at::Tensor& k_k_C,
                             const at::Tensor& k_a_C,
                             int64_t head_size) {
    const at::AutoDispatchBelowAutograd below;
    auto [k_out, v_out, a, b] =
        call_forward(k_BTC, a_raw_BTC, v_BTC, v_raw_BTC, v_first_BTC, k_k_C, k_a_C, head_size);
    const bool has_value_gate = v_raw_BTC.has_value();
    context->save_for_backward({k_BTC,
                                a_raw_BTC,
                                has_value_gate ? v_BTC : at::Tensor(),
                                v_raw_BTC.value_or(at::Tensor()),
                                v_first_BTC.value_or(at::Tensor()),
                                k_k_C,
                                k_a_C});
    context->saved_data["head_size"] = head_size;
    return has_value_gate ? tensor_list{k_out, a, b, v_out} : tensor_list{k_out, a, b};
  }

  static tensor_list backward(AutogradContext* context, tensor_list grads) {
    using Result = std::
        tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
    using Backward = Result(const at::Tensor&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&,
                            const std::optional<at::Tensor>&,
                            const at::Tensor&,
                            const at::Tensor&,
                            int64_t,
                            const at::Tensor&,
                            const at::Tensor&,
                            const at::Tensor&,
                            const std::optional<at::Tensor>&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::wkv7_inputs_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    auto [dk, da_raw, dv, dv_raw, dv_first, dk_k, dk_a] =
        op.call(saved[0],
                saved[1],
                if_defined(saved[2]),
                if_defined(saved[3]),
                if_defined(saved[4]),
                saved[5],
                saved[6],
                context->saved_data["head_size"].toInt(),
                grads[0].contiguous(),
                grads[1].contiguous(),
                grads[2].contiguous(),
                grads.size() > 3 ? if_defined(grads[3]) : std::nullopt);
    return {dk, da_raw, dv, dv_raw, dv_first, dk_k, dk_a, at::Tensor()};
  }
};

ForwardResult wkv7_inputs_autograd(const at::Tensor& k_BTC,
                                   const at::Tensor& a_raw_BTC,
                                   const at::Tensor& v_BTC,
                                   const std::optional<at::Tensor>& v_raw_BTC,
                                   const std::optional<at::Tensor>& v_first_BTC,
                                   const at::Tensor& k_k_C,
                                   const at::Tensor& k_a_C,
                                   int64_t head_size) {
  const tensor_list output = Wkv7InputsFunction::apply(
      k_BTC, a_raw_BTC, v_BTC, v_raw_BTC, v_first_BTC, k_k_C, k_a_C, head_size);
  return {output[0], output.size() > 3 ? output[3] : at::Tensor(), output[1], output[2]};
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "wkv7_inputs(Tensor k, Tensor a_raw, Tensor v, Tensor? v_raw, Tensor? v_first, Tensor k_k, "
      "Tensor k_a, int head_size) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "wkv7_inputs_backward(Tensor k, Tensor a_raw, Tensor? v, Tensor? v_raw, Tensor? v_first, "
      "Tensor k_k, Tensor k_a, int head_size, Tensor dk, Tensor da, Tensor db, Tensor? dv) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("wkv7_inputs", &wkv7_inputs_autograd);
}

}  // namespace

Wkv7InputsOutput wkv7_inputs(const at::Tensor& k_BTC,
                             const at::Tensor& a_raw_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& v_raw_BTC,
                             const at::Tensor& v_first_BTC,
                             const at::Tensor& k_k_C,
                             const at::Tensor& k_a_C,
                             int64_t head_size) {
  constexpr const char* kOp = "wkv7_inputs";
  const Argument k{"k_BTC", k_BTC};
  check_sequence(kOp, k);
  check_like(kOp, {"a_raw_BTC", a_raw_BTC}, k);
  check_like(kOp, {"v_BTC", v_BTC}, k);
  TORCH_CHECK(v_raw_BTC.defined() == v_first_BTC.defined(),
              "wkv7_inputs: of v_raw_BTC and v_first_BTC one is there and one is not");
  if (v_raw_BTC.defined()) {
    check_like(kOp, {"v_raw_BTC", v_raw_BTC}, k);
    check_like(kOp, {"v_first_BTC", v_first_BTC}, k);
  }
  check_vector(kOp, {"k_k_C", k_k_C}, k_BTC.scalar_type(), k);
  check_vector(kOp, {"k_a_C", k_a_C}, k_BTC.scalar_type(), k);
  const int64_t n_embd = k_BTC.size(2);
  TORCH_CHECK(head_size >= 1 && n_embd % head_size == 0,
              "wkv7_inputs: head_size is ",
              head_size,
              ", expected a divisor of the ",
              n_embd,
              " channels of k_BTC");
  auto [k_out, v_out, a, b] = call_forward(k_BTC.contiguous(),
                                           a_raw_BTC.contiguous(),
                                           v_BTC.contiguous(),
                                           if_defined(v_raw_BTC),
                                           if_defined(v_first_BTC),
                                           k_k_C.contiguous(),
                                           k_a_C.contiguous(),
                                           head_size);
  return {.k_BTC = k_out, .v_BTC = v_raw_BTC.defined() ? v_out : v_BTC, .a_BTC = a, .b_BTC = b};
}

}  // namespace rwkv::ops
