// The launchers of wkv4: what is common to its kernels, and the choice of one.
#include <cuda_bf16.h>

#include "cuda/wkv4_kernel.h"
#include "cuda/wkv4_launch.h"

namespace rwkv {
namespace wkv4 {
namespace {

cudaError_t set_zero(float* x, int64_t size, cudaStream_t stream) {
  return cudaMemsetAsync(x, 0, static_cast<size_t>(size) * sizeof(float), stream);
}
// x, or zeros where it is null.
cudaError_t hand_on(const float* x, float* out, int64_t size, cudaStream_t stream) {
  return x == nullptr ? set_zero(out, size, stream)
                      : cudaMemcpyAsync(out,
                                        x,
                                        static_cast<size_t>(size) * sizeof(float),
                                        cudaMemcpyDeviceToDevice,
                                        stream);
}

}  // namespace
}  // namespace wkv4

int64_t wkv4_carries_floats(int64_t B, int64_t T, int64_t A) {
  return B * (wkv4::num_tiles(T) + 1) * 3 * A;
}

template <typename Element>
int64_t wkv4_scratch_floats(Wkv4Kernel kernel, int64_t B, int64_t T, int64_t A, bool backward) {
  if (B == 0 || T == 0 || A == 0) {
    return 0;
  }
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return wkv4::plain_scratch_floats(B, A, backward);
    case Wkv4Kernel::kChunkScan:
      return wkv4::chunk_scan_scratch_floats<Element>(B, T, A, backward);
    case Wkv4Kernel::kClusterScan:
      return wkv4::cluster_scan_scratch_floats<Element>(B, T, A, backward);
  }
  return 0;
}

template <typename Element>
cudaError_t launch_wkv4(Wkv4Kernel kernel, const Wkv4Forward<Element>& args, cudaStream_t stream) {
  if (args.B == 0 || args.A == 0) {
    return cudaSuccess;
  }
  if (args.T == 0) {
    return wkv4::hand_on(args.state, args.state_out, args.B * 3 * args.A, stream);
  }
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return wkv4::launch_plain(args, stream);
    case Wkv4Kernel::kChunkScan:
      return wkv4::launch_chunk_scan(args, stream);
    case Wkv4Kernel::kClusterScan:
      return wkv4::launch_cluster_scan(args, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename Element>
cudaError_t launch_wkv4_backward(Wkv4Kernel kernel,
                                 const Wkv4Backward<Element>& args,
                                 cudaStream_t stream) {
  if (args.A == 0) {
    return cudaSuccess;
  }
  if (args.B == 0 || args.T == 0) {
    cudaError_t error = wkv4::set_zero(args.dw_log, args.A, stream);
    if (error == cudaSuccess) {
      error = wkv4::set_zero(args.du, args.A, stream);
    }
    return error == cudaSuccess && args.B > 0
               ? wkv4::hand_on(args.dstate_out, args.dstate, args.B * 3 * args.A, stream)
               : error;
  }
  switch (kernel) {
    case Wkv4Kernel::kPlain:
      return wkv4::launch_plain_backward(args, stream);
    case Wkv4Kernel::kChunkScan:
      return wkv4::launch_chunk_scan_backward(args, stream);
    case Wkv4Kernel::kClusterScan:
      return wkv4::launch_cluster_scan_backward(args, stream);
  }
  return cudaErrorInvalidValue;
}

#define RWKV_INSTANTIATE(Element)                                                             \
  template int64_t wkv4_scratch_floats<Element>(Wkv4Kernel, int64_t, int64_t, int64_t, bool); \
  template cudaError_t launch_wkv4(Wkv4Kernel, const Wkv4Forward<Element>&, cudaStream_t);    \
  template cudaError_t launch_wkv4_backward(Wkv4Kernel, const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
