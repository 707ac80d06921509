// Sums over the rows of a matrix of partial sums. Source: none; the order of additions is ours.
//
// Order: row r belongs to part r / ceil(R / 16). A part adds its rows first to last, four sums in
// turn; then the sixteen parts are added first to last.
// Launch shape: a block owns 32 neighbouring columns, a lane one of them, a warp one part of the
// rows; 16 warps. A warp reads 128 bytes of a row at a time, four rows in flight a lane. The rows
// of layer_norm_shift_mix (528 of 3840 columns at C 768) give 120 blocks of 33 rows a warp. Floor:
// 4 bytes a number. The rows were just written and mostly come from the second-level cache.
#include "cuda/column_sum_kernel.h"
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"

namespace rwkv {
namespace {

constexpr int kParts = 16;
// Independent sums of a lane: as many loads are in flight.
constexpr int kChains = 4;

template <typename Element>
__device__ __forceinline__ void store_sum(const ColumnTargets<Element>& targets,
                                          int64_t column,
                                          float sum) {
#pragma unroll
  for (int i = 0; i < kMaxColumnTargets; ++i) {
    if (column >= 0 && column < targets.columns[i]) {
      targets.data[i][column] = from_float<Element>(sum);
    }
    column -= targets.columns[i];
  }
}

template <typename Element>
__global__ void __launch_bounds__(kParts* kWarpSize)
    column_sum_kernel(const float* __restrict__ rows,
                      int64_t num_rows,
                      int64_t num_columns,
                      ColumnTargets<Element> targets) {
  float* const sums = static_cast<float*>(shared_memory());  // [part][lane]
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int part = static_cast<int>(threadIdx.x) / kWarpSize;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + lane;
  if (column < num_columns) {
    const int64_t part_len = ceil_div(num_rows, kParts);
    const int64_t begin = part * part_len;
    const int64_t end = begin + part_len < num_rows ? begin + part_len : num_rows;
    float chains[kChains] = {};
    int64_t row = begin;
    for (; row + kChains <= end; row += kChains) {
#pragma unroll
      for (int i = 0; i < kChains; ++i) {
        chains[i] += rows[(row + i) * num_columns + column];
      }
    }
    for (; row < end; ++row) {
      chains[0] += rows[row * num_columns + column];
    }
    sums[part * kWarpSize + lane] = (chains[0] + chains[1]) + (chains[2] + chains[3]);
  }
  __syncthreads();
  if (part == 0 && column < num_columns) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      sum += sums[i * kWarpSize + lane];
    }
    store_sum(targets, column, sum);
  }
}

}  // namespace

template <typename Element>
cudaError_t launch_column_sum(const float* rows,
                              int64_t num_rows,
                              const ColumnTargets<Element>& targets,
                              cudaStream_t stream) {
  int64_t num_columns = 0;
  for (const int64_t columns : targets.columns) {
    num_columns += columns;
  }
  if (num_columns == 0) {
    return cudaSuccess;
  }
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(ceil_div(num_columns, kWarpSize))),
                          .block = dim3(kParts * kWarpSize),
                          .shared_bytes = kParts * kWarpSize * sizeof(float)};
  return launch_kernel(
      &column_sum_kernel<Element>, shape, stream, rows, num_rows, num_columns, targets);
}

template cudaError_t launch_column_sum(const float*,
                                       int64_t,
                                       const ColumnTargets<float>&,
                                       cudaStream_t);
template cudaError_t launch_column_sum(const float*,
                                       int64_t,
                                       const ColumnTargets<__nv_bfloat16>&,
                                       cudaStream_t);

}  // namespace rwkv
