// wkv4 on CUDA: tensors to pointers, and which of its kernels runs.
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/wkv4_kernel.h"

namespace rwkv {
namespace {

constexpr Wkv4Kernel kKernel = Wkv4Kernel::kChunkScan;

at::Tensor scratch_for(const at::Tensor& k_BTA, bool backward) {
  return with_element("wkv4", k_BTA, [&](auto element) {
    const int64_t floats = wkv4_scratch_floats<decltype(element)>(
        kKernel, k_BTA.size(0), k_BTA.size(1), k_BTA.size(2), backward);
    return at::empty({floats}, k_BTA.options().dtype(at::kFloat));
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& w_log_A,
                                                       const at::Tensor& k_BTA,
                                                       const at::Tensor& v_BTA,
                                                       const at::Tensor& u_A,
                                                       const at::Tensor& state_B3A,
                                                       const std::optional<at::Tensor>& r_BTA,
                                                       const std::optional<at::Tensor>& starts_BT) {
  const int64_t B = k_BTA.size(0), T = k_BTA.size(1), A = k_BTA.size(2);
  const at::Tensor y_BTA = at::empty_like(k_BTA), state_out_B3A = at::empty_like(state_B3A);
  const at::Tensor carries = at::empty({wkv4_carries_floats(B, T, A)}, state_B3A.options());
  const at::Tensor scratch = scratch_for(k_BTA, false);
  with_element("wkv4", k_BTA, [&](auto element) {
    using Element = decltype(element);
    const Wkv4Forward<Element> arguments{.B = B,
                                         .T = T,
                                         .A = A,
                                         .w_log = pointer<float>(w_log_A),
                                         .k = pointer<Element>(k_BTA),
                                         .v = pointer<Element>(v_BTA),
                                         .u = pointer<float>(u_A),
                                         .state = pointer<float>(state_B3A),
                                         .r = pointer<Element>(r_BTA),
                                         .starts = pointer<bool>(starts_BT),
                                         .y = mutable_pointer<Element>(y_BTA),
                                         .state_out = mutable_pointer<float>(state_out_B3A),
                                         .carries = mutable_pointer<float>(carries),
                                         .scratch = mutable_pointer<float>(scratch)};
    RWKV_CUDA_CHECK(launch_wkv4(kKernel, arguments, current_stream()), "wkv4 of ", k_BTA.sizes());
  });
  return {y_BTA, state_out_B3A, carries};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& w_log_A,
    const at::Tensor& k_BTA,
    const at::Tensor& v_BTA,
    const at::Tensor& u_A,
    const at::Tensor& state_B3A,
    const std::optional<at::Tensor>& r_BTA,
    const std::optional<at::Tensor>& starts_BT,
    const at::Tensor& carries,
    const at::Tensor& dy_BTA,
    const std::optional<at::Tensor>& dstate_out_B3A) {
  const at::Tensor dw_A = at::empty_like(w_log_A), du_A = at::empty_like(u_A);
  const at::Tensor dk_BTA = at::empty_like(k_BTA), dv_BTA = at::empty_like(v_BTA);
  const at::Tensor dstate_B3A = at::empty_like(state_B3A);
  const at::Tensor dr_BTA = r_BTA ? at::empty_like(*r_BTA) : at::Tensor();
  const at::Tensor scratch = scratch_for(k_BTA, true);
  with_element("wkv4 backward", k_BTA, [&](auto element) {
    using Element = decltype(element);
    const Wkv4Backward<Element> arguments{.B = k_BTA.size(0),
                                          .T = k_BTA.size(1),
                                          .A = k_BTA.size(2),
                                          .w_log = pointer<float>(w_log_A),
                                          .k = pointer<Element>(k_BTA),
                                          .v = pointer<Element>(v_BTA),
                                          .u = pointer<float>(u_A),
                                          .state = pointer<float>(state_B3A),
                                          .r = pointer<Element>(r_BTA),
                                          .starts = pointer<bool>(starts_BT),
                                          .carries = pointer<float>(carries),
                                          .dy = pointer<Element>(dy_BTA),
                                          .dstate_out = pointer<float>(dstate_out_B3A),
                                          .dw_log = mutable_pointer<float>(dw_A),
                                          .dk = mutable_pointer<Element>(dk_BTA),
                                          .dv = mutable_pointer<Element>(dv_BTA),
                                          .du = mutable_pointer<float>(du_A),
                                          .dstate = mutable_pointer<float>(dstate_B3A),
                                          .dr = mutable_pointer<Element>(dr_BTA),
                                          .scratch = mutable_pointer<float>(scratch)};
    RWKV_CUDA_CHECK(launch_wkv4_backward(kKernel, arguments, current_stream()),
                    "wkv4 backward of ",
                    k_BTA.sizes());
  });
  return {dw_A, dk_BTA, dv_BTA, du_A, dstate_B3A, dr_BTA};
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("wkv4", &forward);
  library.impl("wkv4_backward", &backward);
}

}  // namespace
}  // namespace rwkv
