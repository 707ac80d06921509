// The launchers of each wkv4 kernel, for cuda/wkv4_kernel.cu to choose from. T, B and A are not
// zero.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "cuda/column_sum_kernel.h"
#include "cuda/wkv4_kernel.h"

namespace rwkv::wkv4 {

inline int64_t num_tiles(int64_t T) {
  return (T + kWkv4CarryLen - 1) / kWkv4CarryLen;
}

// dw and du, [A], from what each block left of them: [rows, A] each, added in a fixed order.
inline cudaError_t launch_parameter_sums(const float* dw_rows,
                                         const float* du_rows,
                                         int64_t rows,
                                         int64_t A,
                                         float* dw,
                                         float* du,
                                         cudaStream_t stream) {
  const cudaError_t error =
      launch_column_sum<float>(dw_rows, rows, {.data = {dw}, .columns = {A}}, stream);
  return error == cudaSuccess
             ? launch_column_sum<float>(du_rows, rows, {.data = {du}, .columns = {A}}, stream)
             : error;
}

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
