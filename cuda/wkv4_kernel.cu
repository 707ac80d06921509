// Launches wkv4 by the kernel's name, and does what no kernel is needed for: no tokens.
#include <cuda_bf16.h>

#include "cuda/wkv4_kernel.h"
#include "cuda/wkv4_kernels.h"

namespace rwkv {
namespace {

template <typename Element>
bool is_empty(const Wkv4Inputs<Element>& in) {
  return in.batch_size == 0 || in.dim_att == 0;
}

size_t bytes_of(int64_t floats) {
  return static_cast<size_t>(floats) * sizeof(float);
}

template <typename Element>
cudaError_t forward_without_tokens(const Wkv4Forward<Element>& pass, cudaStream_t stream) {
  return cudaMemcpyAsync(pass.state_out,
                         pass.in.state,
                         bytes_of(pass.in.batch_size * 3 * pass.in.dim_att),
                         cudaMemcpyDeviceToDevice,
                         stream);
}

template <typename Element>
cudaError_t backward_without_tokens(const Wkv4Backward<Element>& pass, cudaStream_t stream) {
  const int64_t dim_att = pass.in.dim_att;
  const int64_t batch_size = pass.in.batch_size;
  cudaError_t error = cudaMemsetAsync(pass.dw, 0, bytes_of(dim_att), stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(pass.du, 0, bytes_of(dim_att), stream);
  }
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(pass.dstate, 0, bytes_of(batch_size * 3 * dim_att), stream);
  }
  if (error != cudaSuccess || pass.dstate_out == nullptr) {
    return error;
  }
  // a and b; p has no gradient.
  return cudaMemcpy2DAsync(pass.dstate,
                           bytes_of(3 * dim_att),
                           pass.dstate_out,
                           bytes_of(3 * dim_att),
                           bytes_of(2 * dim_att),
                           static_cast<size_t>(batch_size),
                           cudaMemcpyDeviceToDevice,
                           stream);
}

}  // namespace

int64_t wkv4_scratch_floats(
    Wkv4Kernel kernel, Wkv4Pass pass, int64_t batch_size, int64_t /*seq_len*/, int64_t dim_att) {
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return wkv4_plain_scratch_floats(pass, batch_size, dim_att);
    case Wkv4Kernel::kChunkScan:
    case Wkv4Kernel::kClusterScan:
      return 0;
  }
  return 0;
}

template <typename Element>
cudaError_t launch_wkv4(Wkv4Kernel kernel, const Wkv4Forward<Element>& pass, cudaStream_t stream) {
  if (is_empty(pass.in)) {
    return cudaSuccess;
  }
  if (pass.in.seq_len == 0) {
    return forward_without_tokens(pass, stream);
  }
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return launch_wkv4_plain(pass, stream);
    case Wkv4Kernel::kChunkScan:
    case Wkv4Kernel::kClusterScan:
      return cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

template <typename Element>
cudaError_t launch_wkv4_backward(Wkv4Kernel kernel,
                                 const Wkv4Backward<Element>& pass,
                                 cudaStream_t stream) {
  if (is_empty(pass.in)) {
    return cudaSuccess;
  }
  if (pass.in.seq_len == 0) {
    return backward_without_tokens(pass, stream);
  }
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return launch_wkv4_plain_backward(pass, stream);
    case Wkv4Kernel::kChunkScan:
    case Wkv4Kernel::kClusterScan:
      return cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

#define RWKV_INSTANTIATE(Element)                                                          \
  template cudaError_t launch_wkv4(Wkv4Kernel, const Wkv4Forward<Element>&, cudaStream_t); \
  template cudaError_t launch_wkv4_backward(Wkv4Kernel, const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
