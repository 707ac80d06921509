// Launchers of gated_residual and relu_squared_ (model/ops): one pass over their tensors.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory, `size` elements each, `Element` float or __nv_bfloat16;
// arithmetic is fp32. Outputs may not overlap inputs. A size of zero launches nothing. The error is
// the launch's.

// out = x + sigmoid(r) y.
template <typename Element>
cudaError_t launch_gated_residual(const Element* x,
                                  const Element* r,
                                  const Element* y,
                                  Element* out,
                                  int64_t size,
                                  cudaStream_t stream);
// dr = dout y s (1 - s), dy = dout s, with s = sigmoid(r).
template <typename Element>
cudaError_t launch_gated_residual_backward(const Element* r,
                                           const Element* y,
                                           const Element* dout,
                                           Element* dr,
                                           Element* dy,
                                           int64_t size,
                                           cudaStream_t stream);

// x becomes max(x, 0)^2.
template <typename Element>
cudaError_t launch_relu_squared(Element* x, int64_t size, cudaStream_t stream);
// h, the output of the above, becomes 2 sqrt(h) dh.
template <typename Element>
cudaError_t launch_relu_squared_backward(Element* h,
                                         const Element* dh,
                                         int64_t size,
                                         cudaStream_t stream);

}  // namespace rwkv
