#include "model/ops/wkv7_output.h"

#include <tuple>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "model/ops/arguments.h"

namespace rwkv::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

at::Tensor call_forward(const at::Tensor& y_BTC,
                        const at::Tensor& r_BTC,
                        const at::Tensor& k_BTC,
                        const at::Tensor& v_BTC,
                        const at::Tensor& g_BTC,
                        const at::Tensor& r_k_HN,
                        const at::Tensor& weight_C,
                        const at::Tensor& bias_C,
                        double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("rookery::wkv7_output", "")
                             .typed<at::Tensor(const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               const at::Tensor&,
                                               double)>();
  return op.call(y_BTC, r_BTC, k_BTC, v_BTC, g_BTC, r_k_HN, weight_C, bias_C, eps);
}

struct Wkv7OutputFunction : torch::autograd::Function<Wkv7OutputFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& y_BTC,
                            const at::Tensor& r_BTC,
                            const at::Tensor& k_BTC,
                            const at::Tensor& v_BTC,
                            const at::Tensor& g_BTC,
                            const at::Tensor& r_k_HN,
                            const at::Tensor& weight_C,
                            const at::Tensor& bias_C,
                            double eps) {
    const at::AutoDispatchBelowAutograd below;
    context->save_for_backward({y_BTC, r_BTC, k_BTC, v_BTC, g_BTC, r_k_HN, weight_C, bias_C});
    context->saved_data["eps"] = eps;
    return call_forward(y_BTC, r_BTC, k_BTC, v_BTC, g_BTC, r_k_HN, weight_C, bias_C, eps);
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
                            double,
                            const at::Tensor&);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("rookery::wkv7_output_backward", "")
                               .typed<Backward>();
    const auto saved = context->get_saved_variables();
    auto [dy, dr, dk, dv, dg, dr_k, dweight, dbias] = op.call(saved[0],
                                                              saved[1],
                                                              saved[2],
                                                              saved[3],
                                                              saved[4],
                                                              saved[5],
                                                              saved[6],
                                                              saved[7],
                                                              context->saved_data["eps"].toDouble(),
                                                              grads[0].contiguous());
    return {dy, dr, dk, dv, dg, dr_k, dweight, dbias, at::Tensor()};
  }
};

at::Tensor wkv7_output_autograd(const at::Tensor& y_BTC,
                                const at::Tensor& r_BTC,
                                const at::Tensor& k_BTC,
                                const at::Tensor& v_BTC,
                                const at::Tensor& g_BTC,
                                const at::Tensor& r_k_HN,
                                const at::Tensor& weight_C,
                                const at::Tensor& bias_C,
                                double eps) {
  return Wkv7OutputFunction::apply(
      y_BTC, r_BTC, k_BTC, v_BTC, g_BTC, r_k_HN, weight_C, bias_C, eps);
}

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def(
      "wkv7_output(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, Tensor weight, "
      "Tensor bias, float eps) -> Tensor");
  library.def(
      "wkv7_output_backward(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor r_k, "
      "Tensor weight, Tensor bias, float eps, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rookery, Autograd, library) {
  library.impl("wkv7_output", &wkv7_output_autograd);
}

}  // namespace

at::Tensor wkv7_output(const at::Tensor& y_BTC,
                       const at::Tensor& r_BTC,
                       const at::Tensor& k_BTC,
                       const at::Tensor& v_BTC,
                       const at::Tensor& g_BTC,
                       const at::Tensor& r_k_HN,
                       const at::Tensor& weight_C,
                       const at::Tensor& bias_C,
                       double eps) {
  constexpr const char* kOp = "wkv7_output";
  const Argument y{"y_BTC", y_BTC};
  check_sequence(kOp, y);
  check_like(kOp, {"r_BTC", r_BTC}, y);
  check_like(kOp, {"k_BTC", k_BTC}, y);
  check_like(kOp, {"v_BTC", v_BTC}, y);
  check_like(kOp, {"g_BTC", g_BTC}, y);
  const at::ScalarType dtype = y_BTC.scalar_type();
  const int64_t n_embd = y_BTC.size(2);
  TORCH_CHECK(r_k_HN.dim() == 2 && r_k_HN.numel() == n_embd && r_k_HN.scalar_type() == dtype,
              "wkv7_output: r_k_HN is ",
              r_k_HN.scalar_type(),
              " ",
              r_k_HN.sizes(),
              ", expected ",
              dtype,
              " [H, N] with H N = ",
              n_embd);
  check_vector(kOp, {"weight_C", weight_C}, dtype, y);
  check_vector(kOp, {"bias_C", bias_C}, dtype, y);
  return call_forward(y_BTC.contiguous(),
                      r_BTC.contiguous(),
                      k_BTC.contiguous(),
                      v_BTC.contiguous(),
                      g_BTC.contiguous(),
                      r_k_HN.contiguous(),
                      weight_C.contiguous(),
                      bias_C.contiguous(),
                      eps);
}

}  // namespace rwkv::ops
