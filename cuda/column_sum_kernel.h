// Sums over the rows of a matrix of partial sums, in a fixed order: how kernels that run over
// tokens end up with gradients of parameters.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

constexpr int kMaxColumnTargets = 3;

// Where neighbouring groups of columns go: the first columns[0] of a row to data[0], the next
// columns[1] to data[1], ... Targets that are not needed have no columns.
template <typename Element>
struct ColumnTargets {
  Element* data[kMaxColumnTargets] = {};
  int64_t columns[kMaxColumnTargets] = {};
};

// data_c = sum_r rows_r,c:
//   rows     [num_rows, all columns of the targets], fp32, contiguous
//   targets  as above, `Element` float or __nv_bfloat16; rounded once
// All in device memory. The order of additions depends on num_rows alone: two runs give the same
// bits. No rows give zeros; no columns launch nothing. The error is the launch's.
template <typename Element>
cudaError_t launch_column_sum(const float* rows,
                              int64_t num_rows,
                              const ColumnTargets<Element>& targets,
                              cudaStream_t stream);

}  // namespace rwkv
