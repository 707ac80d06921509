// Launchers of embedding (model/ops/embedding.h).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory; `Element` is float or __nv_bfloat16. Rows are without gaps,
// and fastest where they begin at a multiple of 16 bytes; any C works. Nothing is allocated. The
// error is the launch's.

// out_n = weight[token_n].
//   weight  [V, C]
//   tokens  [N], int64, each in [0, V): a device cannot throw, so any other gives a row of NaN
//   out     [N, C]
template <typename Element>
cudaError_t launch_embedding(const Element* weight,
                             const int64_t* tokens,
                             Element* out,
                             int64_t N,
                             int64_t V,
                             int64_t C,
                             cudaStream_t stream);

// Floats that launch_embedding_backward needs as scratch.
int64_t embedding_backward_scratch_size(int64_t N, int64_t C);

// dweight[v] = sum over n with token_n = v of dy_n, first to last.
//   dy             [N, C]
//   sorted_tokens  [N], int64, the tokens in rising order; those outside of [0, V) are left out
//   order          [N], int64, where each of them stood: of equal ones in rising order, as a stable
//                  sort leaves them
//   dweight        [V, C], every row written, zeros where a token does not occur
//   scratch        [embedding_backward_scratch_size(N, C)], fp32
// Sums are fp32, of up to 32 rows each and then of these sums, and are rounded once. The order is
// that of the sorted rows alone, so that two runs agree bit for bit.
template <typename Element>
cudaError_t launch_embedding_backward(const Element* dy,
                                      const int64_t* sorted_tokens,
                                      const int64_t* order,
                                      Element* dweight,
                                      float* scratch,
                                      int64_t N,
                                      int64_t V,
                                      int64_t C,
                                      cudaStream_t stream);

}  // namespace rwkv
