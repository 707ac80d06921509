// gated_residual and relu_squared_ on CUDA: tensors to pointers.
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

#include "cuda/device.h"
#include "cuda/elementwise_kernel.h"

namespace rwkv {
namespace {

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y) {
  at::Tensor out = at::empty_like(x);
  with_element("gated_residual", x, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_gated_residual(pointer<Element>(x),
                                          pointer<Element>(r),
                                          pointer<Element>(y),
                                          mutable_pointer<Element>(out),
                                          x.numel(),
                                          current_stream()),
                    "gated_residual of ",
                    x.sizes());
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward(const at::Tensor& r,
                                                           const at::Tensor& y,
                                                           const at::Tensor& dout) {
  at::Tensor dr = at::empty_like(r), dy = at::empty_like(y);
  with_element("gated_residual backward", r, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_gated_residual_backward(pointer<Element>(r),
                                                   pointer<Element>(y),
                                                   pointer<Element>(dout),
                                                   mutable_pointer<Element>(dr),
                                                   mutable_pointer<Element>(dy),
                                                   r.numel(),
                                                   current_stream()),
                    "gated_residual backward of ",
                    r.sizes());
  });
  return {dr, dy};
}

at::Tensor& relu_squared(at::Tensor& x) {
  with_element("relu_squared_", x, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(launch_relu_squared(mutable_pointer<Element>(x), x.numel(), current_stream()),
                    "relu_squared_ of ",
                    x.sizes());
  });
  return x;
}

at::Tensor& relu_squared_backward(at::Tensor& h, const at::Tensor& dh) {
  with_element("relu_squared_ backward", h, [&](auto element) {
    using Element = decltype(element);
    RWKV_CUDA_CHECK(
        launch_relu_squared_backward(
            mutable_pointer<Element>(h), pointer<Element>(dh), h.numel(), current_stream()),
        "relu_squared_ backward of ",
        h.sizes());
  });
  return h;
}

TORCH_LIBRARY_IMPL(rookery, CUDA, library) {
  library.impl("gated_residual", &gated_residual);
  library.impl("gated_residual_backward", &gated_residual_backward);
  library.impl("relu_squared_", &relu_squared);
  library.impl("relu_squared_backward_", &relu_squared_backward);
}

}  // namespace
}  // namespace rwkv
