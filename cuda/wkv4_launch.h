// The launchers of each wkv4 kernel, for cuda/wkv4_kernel.cu to choose from. T, B and A are not
// zero.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/wkv4_kernel.h"

namespace rwkv::wkv4 {

inline int64_t num_tiles(int64_t T) {
  return (T + kWkv4CarryLen - 1) / kWkv4CarryLen;
}

// out[c] = sum over rows of x [rows, A], in a fixed order.
cudaError_t launch_sum_rows(
    const float* x, int64_t rows, int64_t dim, float* out, cudaStream_t stream);

int64_t plain_scratch_floats(int64_t B, int64_t A, bool backward);
template <typename Element>
cudaError_t launch_plain(const Wkv4Forward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_plain_backward(const Wkv4Backward<Element>& args, cudaStream_t stream);

template <typename Element>
int64_t chunk_scan_scratch_floats(int64_t B, int64_t T, int64_t A, bool backward);
template <typename Element>
cudaError_t launch_chunk_scan(const Wkv4Forward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_chunk_scan_backward(const Wkv4Backward<Element>& args, cudaStream_t stream);

template <typename Element>
int64_t cluster_scan_scratch_floats(int64_t B, int64_t T, int64_t A, bool backward);
template <typename Element>
cudaError_t launch_cluster_scan(const Wkv4Forward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_cluster_scan_backward(const Wkv4Backward<Element>& args, cudaStream_t stream);

}  // namespace rwkv::wkv4
