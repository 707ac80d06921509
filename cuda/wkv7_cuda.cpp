// wkv7, wkv7_inputs and wkv7_output on CUDA: tensors to pointers.
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/wkv7_frame_kernel.h"
#include "cuda/wkv7_kernel.h"

namespace rwkv {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_head_size(const char* op, int64_t head_size) {
  TORCH_CHECK(is_wkv7_head_size(head_size),
              op,
              ": there is no CUDA kernel for heads of ",
              head_size,
              " channels, expected 32, 64 or 128; use the CPU");
}

Wkv7Sizes sizes_of(const Tensor& r_BTC, int64_t num_heads) {
  const Wkv7Sizes sizes{
      .B = r_BTC.size(0), .T = r_BTC.size(1), .H = num_heads, .N = r_BTC.size(2) / num_heads};
  check_head_size("wkv7", sizes.N);
  return sizes;
}

template <typename Element>
Wkv7Inputs<Element> inputs_of(const Wkv7Sizes& sizes,
                              const Tensor& r,
                              const Tensor& w_raw,
                              const Tensor& k,
                              const Tensor& v,
                              const Tensor& a,
                              const Tensor& b,
                              const Tensor& w0,
                              const OptionalTensor& starts) {
  return {.sizes = sizes,
          .r = pointer<Element>(r),
          .w_raw = pointer<Element>(w_raw),
          .k = pointer<Element>(k),
          .v = pointer<Element>(v),
          .a = pointer<Element>(a),
          .b = pointer<Element>(b),
          .w0 = pointer<float>(w0),
          .starts = pointer<bool>(starts)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7(const Tensor& r,
                                                const Tensor& w_raw,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const Tensor& a,
                                                const Tensor& b,
                                                const Tensor& w0,
                                                const Tensor& state,
                                                const OptionalTensor& starts,
                                                bool for_backward) {
  const Wkv7Sizes sizes = sizes_of(r, state.size(1));
  const at::TensorOptions exact = state.options().requires_grad(false);
  const Tensor y = at::empty_like(r), state_out = at::empty(state.sizes(), exact);
  const Tensor u = at::empty(for_backward ? r.sizes() : at::IntArrayRef({0}), exact);
  // What its head count is, backward reads from the shape.
  const Tensor carries = for_backward
                             ? at::empty({sizes.H, wkv7_carries_floats(sizes) / sizes.H}, exact)
                             : at::empty({0}, exact);
  with_element("wkv7", r, [&](auto element) {
    using Element = decltype(element);
    const Wkv7Forward<Element> arguments{
        .in = inputs_of<Element>(sizes, r, w_raw, k, v, a, b, w0, starts),
        .state = pointer<float>(state),
        .y = mutable_pointer<Element>(y),
        .state_out = mutable_pointer<float>(state_out),
        .u = for_backward ? mutable_pointer<float>(u) : nullptr,
        .carries = for_backward ? mutable_pointer<float>(carries) : nullptr};
    RWKV_CUDA_CHECK(launch_wkv7(arguments, current_stream()), "wkv7 of ", r.sizes());
  });
  return {y, state_out, u, carries};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& r,
    const Tensor& w_raw,
    const Tensor& k,
    const Tensor& v,
    const Tensor& a,
    const Tensor& b,
    const Tensor& w0,
    const Tensor& u,
    const Tensor& carries,
    const OptionalTensor& starts,
    const Tensor& dy,
    const OptionalTensor& dstate_out) {
  const Wkv7Sizes sizes = sizes_of(r, carries.size(0));
  const Tensor dr = at::empty_like(r), dw_raw = at::empty_like(r), dk = at::empty_like(r),
               dv = at::empty_like(r), da = at::empty_like(r), db = at::empty_like(r);
  const Tensor dw0 = at::empty({sizes.B, sizes.H * sizes.N}, u.options());
  const Tensor dstate = at::empty({sizes.B, sizes.H, sizes.N, sizes.N}, u.options());
  const Tensor du = at::empty_like(u);
  with_element("wkv7 backward", r, [&](auto element) {
    using Element = decltype(element);
    const Wkv7Backward<Element> arguments{
        .in = inputs_of<Element>(sizes, r, w_raw, k, v, a, b, w0, starts),
        .u = pointer<float>(u),
        .carries = pointer<float>(carries),
        .dy = pointer<Element>(dy),
        .dstate_out = pointer<float>(dstate_out),
        .dr = mutable_pointer<Element>(dr),
        .dw_raw = mutable_pointer<Element>(dw_raw),
        .dk = mutable_pointer<Element>(dk),
        .dv = mutable_pointer<Element>(dv),
        .da = mutable_pointer<Element>(da),
        .db = mutable_pointer<Element>(db),
        .dw0 = mutable_pointer<float>(dw0),
        .dstate = mutable_pointer<float>(dstate),
        .du = mutable_pointer<float>(du)};
    RWKV_CUDA_CHECK(
        launch_wkv7_backward(arguments, current_stream()), "wkv7 backward of ", r.sizes());
  });
  return {dr, dw_raw, dk, dv, da, db, dw0.sum(0), dstate};
}

// ---- What stands before and behind it -----------------------------------------------------------

Wkv7FrameSizes frame_sizes_of(const char* op, const Tensor& x_BTC, int64_t head_size) {
  check_head_size(op, head_size);
  return {.tokens = x_BTC.size(0) * x_BTC.size(1), .H = x_BTC.size(2) / head_size, .N = head_size};
}

Tensor scratch_for(const Wkv7FrameSizes& sizes, const Tensor& like) {
  return at::empty({wkv7_frame_scratch_floats(sizes)}, like.options().dtype(at::kFloat));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> wkv7_inputs(const Tensor& k,
                                                       const Tensor& a_raw,
                                                       const Tensor& v,
                                                       const OptionalTensor& v_raw,
                                                       const OptionalTensor& v_first,
                                                       const Tensor& k_k,
                                                       const Tensor& k_a,
                                                       int64_t head_size) {
  const Wkv7FrameSizes sizes = frame_sizes_of("wkv7_inputs", k, head_size);
  const Tensor k_out = at::empty_like(k), a = at::empty_like(k), b = at::empty_like(k),
               v_out = v_raw ? at::empty_like(k) : Tensor();
  with_element("wkv7_inputs", k, [&](auto element) {
    using Element = decltype(element);
    const Wkv7InputsForward<Element> arguments{.sizes = sizes,
                                               .k = pointer<Element>(k),
                                               .a_raw = pointer<Element>(a_raw),
                                               .v = pointer<Element>(v),
                                               .v_raw = pointer<Element>(v_raw),
                                               .v_first = pointer<Element>(v_first),
                                               .k_k = pointer<Element>(k_k),
                                               .k_a = pointer<Element>(k_a),
                                               .k_out = mutable_pointer<Element>(k_out),
                                               .a = mutable_pointer<Element>(a),
                                               .b = mutable_pointer<Element>(b),
                                               .v_out = mutable_pointer<Element>(v_out)};
    RWKV_CUDA_CHECK(launch_wkv7_inputs(arguments, current_stream()), "wkv7_inputs of ", k.sizes());
  });
  return {k_out, v_out, a, b};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_inputs_backward(
    const Tensor& k,
    const Tensor& a_raw,
    const OptionalTensor& v,
    const OptionalTensor& v_raw,
    const OptionalTensor& v_first,
    const Tensor& k_k,
    const Tensor& k_a,
    int64_t head_size,
    const Tensor& dk_out,
    const Tensor& da,
    const Tensor& db,
    const OptionalTensor& dv_out) {
  const Wkv7FrameSizes sizes = frame_sizes_of("wkv7_inputs backward", k, head_size);
  const auto empty_if_gated = [&] { return v_raw ? at::empty_like(k) : Tensor(); };
  const Tensor dk = at::empty_like(k), da_raw = at::empty_like(k), dv = empty_if_gated(),
               dv_raw = empty_if_gated(), dv_first = empty_if_gated(), dk_k = at::empty_like(k_k),
               dk_a = at::empty_like(k_a), scratch = scratch_for(sizes, k);
  with_element("wkv7_inputs backward", k, [&](auto element) {
    using Element = decltype(element);
    const Wkv7InputsBackward<Element> arguments{.sizes = sizes,
                                                .k = pointer<Element>(k),
                                                .a_raw = pointer<Element>(a_raw),
                                                .v = pointer<Element>(v),
                                                .v_raw = pointer<Element>(v_raw),
                                                .v_first = pointer<Element>(v_first),
                                                .k_k = pointer<Element>(k_k),
                                                .k_a = pointer<Element>(k_a),
                                                .dk_out = pointer<Element>(dk_out),
                                                .da = pointer<Element>(da),
                                                .db = pointer<Element>(db),
                                                .dv_out = pointer<Element>(dv_out),
                                                .dk = mutable_pointer<Element>(dk),
                                                .da_raw = mutable_pointer<Element>(da_raw),
                                                .dv = mutable_pointer<Element>(dv),
                                                .dv_raw = mutable_pointer<Element>(dv_raw),
                                                .dv_first = mutable_pointer<Element>(dv_first),
                                                .dk_k = mutable_pointer<Element>(dk_k),
                                                .dk_a = mutable_pointer<Element>(dk_a),
                                                .scratch = mutable_pointer<float>(scratch)};
    RWKV_CUDA_CHECK(launch_wkv7_inputs_backward(arguments, current_stream()),
                    "wkv7_inputs backward of ",
                    k.sizes());
  });
  return {dk, da_raw, dv, dv_raw, dv_first, dk_k, dk_a};
}

Tensor wkv7_output(const Tensor& y,
                   const Tensor& r,
                   const Tensor& k,
                   const Tensor& v,
                   const Tensor& g,
                   const Tensor& r_k,
                   const Tensor& weight,
                   const Tensor& bias,
                   double eps) {
  const Tensor out = at::empty_like(y);
  with_element("wkv7_output", y, [&](auto element) {
    using Element = decltype(element);
    const Wkv7OutputForward<Element> arguments{
        .sizes = frame_sizes_of("wkv7_output", y, r_k.size(1)),
        .y = pointer<Element>(y),
        .r = pointer<Element>(r),
        .k = pointer<Element>(k),
        .v = pointer<Element>(v),
        .g = pointer<Element>(g),
        .r_k = pointer<Element>(r_k),
        .weight = pointer<Element>(weight),
        .bias = pointer<Element>(bias),
        .eps = static_cast<float>(eps),
        .out = mutable_pointer<Element>(out)};
    RWKV_CUDA_CHECK(launch_wkv7_output(arguments, current_stream()), "wkv7_output of ", y.sizes());
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_output_backward(
    const Tensor& y,
    const Tensor& r,
    const Tensor& k,
    const Tensor& v,
    const Tensor& g,
    const Tensor& r_k,
    const Tensor& weight,
    const Tensor& bias,
    double eps,
    const Tensor& dout) {
  const Wkv7FrameSizes sizes = frame_sizes_of("wkv7_output backward", y, r_k.size(1));
  const Tensor dy = at::empty_like(y), dr = at::empty_like(y), dk = at::empty_like(y),
               dv = at::empty_like(y), dg = at::empty_like(y), dr_k = at::empty_like(r_k),
               dweight = at::empty_like(weight), dbias = at::empty_like(bias),
               scratch = scratch_for(sizes, y);
  with_element("wkv7_output backward", y, [&](auto element) {
    using Element = decltype(element);
    const Wkv7OutputBackward<Element> arguments{.sizes = sizes,
                                                .y = pointer<Element>(y),
                                                .r = pointer<Element>(r),
                                                .k = pointer<Element>(k),
                                                .v = pointer<Element>(v),
                                                .g = pointer<Element>(g),
                                                .r_k = pointer<Element>(r_k),
                                                .weight = pointer<Element>(weight),
                                                .bias = pointer<Element>(bias),
                                                .eps = static_cast<float>(eps),
                                                .dout = pointer<Element>(dout),
                                                .dy = mutable_pointer<Element>(dy),
                                                .dr = mutable_pointer<Element>(dr),
                                                .dk = mutable_pointer<Element>(dk),
                                                .dv = mutable_pointer<Element>(dv),
                                                .dg = mutable_pointer<Element>(dg),
                                                .dr_k = mutable_pointer<Element>(dr_k),
                                                .dweight = mutable_pointer<Element>(dweight),
                                                .dbias = mutable_pointer<Element>(dbias),
                                                .scratch = mutable_pointer<float>(scratch)};
    RWKV_CUDA_CHECK(launch_wkv7_output_backward(arguments, current_stream()),
                    "wkv7_output backward of ",
                    y.sizes());
  });
  return {dy, dr, dk, dv, dg, dr_k, dweight, dbias};
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("wkv7", &wkv7);
  library.impl("wkv7_backward", &wkv7_backward);
  library.impl("wkv7_inputs", &wkv7_inputs);
  library.impl("wkv7_inputs_backward", &wkv7_inputs_backward);
  library.impl("wkv7_output", &wkv7_output);
  library.impl("wkv7_output_backward", &wkv7_output_backward);
}

}  // namespace
}  // namespace rwkv
