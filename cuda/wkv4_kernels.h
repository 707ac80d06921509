// The kernels behind cuda/wkv4_kernel.h, one launcher each; what they take and return is described
// there. They are called with B, T and A above zero.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/wkv4_kernel.h"

namespace rwkv {

int64_t wkv4_plain_scratch_floats(Wkv4Pass pass, int64_t batch_size, int64_t dim_att);
template <typename Element>
cudaError_t launch_wkv4_plain(const Wkv4Forward<Element>& pass, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv4_plain_backward(const Wkv4Backward<Element>& pass, cudaStream_t stream);

}  // namespace rwkv
