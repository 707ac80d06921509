// Launching a kernel: the one form that both nvcc and the host runner of the tests take.
#pragma once

#include <cstddef>
#include <utility>

#include <cuda_runtime.h>

namespace rwkv {

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // of dynamic shared memory
  unsigned cluster_x = 1;   // blocks along x that form a cluster; above 1 only on sm_90 and up
};

// Launches, and returns the launch's error. Shared memory beyond 48 KiB is asked for.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...),
                          const LaunchShape& shape,
                          cudaStream_t stream,
                          Arguments&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared_bytes));
    if (error != cudaSuccess) {
      return error;
    }
  }
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.cluster_x;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster_x > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace rwkv
