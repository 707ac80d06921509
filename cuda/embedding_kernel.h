// Launchers of embedding (model/ops/embedding.h).
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory; `Element` is float or __nv_bfloat16. Rows are without gaps,
// and fastest where they begin at a multiple of 16 bytes; any C works. Nothing is allocated. The
// error is the launch's.

template <typename Element>
struct EmbeddingForward {
  int64_t N = 0;
  int64_t V = 0;
  int64_t C = 0;
  const Element* weight = nullptr;  // [V, C]
  // [N], each in [0, V): a device cannot throw, so any other gives a row of NaN
  const int64_t* tokens = nullptr;
  Element* out = nullptr;  // [N, C]
};
// out_n = weight[token_n].
template <typename Element>
cudaError_t launch_embedding(const EmbeddingForward<Element>& arguments, cudaStream_t stream);

// Floats that launch_embedding_backward needs as scratch.
int64_t embedding_backward_scratch_size(int64_t N, int64_t C);

template <typename Element>
struct EmbeddingBackward {
  int64_t N = 0;
  int64_t V = 0;
  int64_t C = 0;
  const Element* dy = nullptr;  // [N, C]
  // [N], the tokens in rising order; those outside of [0, V) are left out
  const int64_t* sorted_tokens = nullptr;
  // [N], where each of them stood: of equal ones in rising order, as a stable sort leaves them
  const int64_t* order = nullptr;
  Element* dweight = nullptr;  // [V, C], every row written, zeros where a token does not occur
  float* scratch = nullptr;    // embedding_backward_scratch_size(N, C) numbers
};
// dweight[v] = sum over n with token_n = v of dy_n, first to last. Sums are fp32, of up to 32 rows
// each and then of these sums, and are rounded once. The order is that of the sorted rows alone, so
// that two runs agree bit for bit.
template <typename Element>
cudaError_t launch_embedding_backward(const EmbeddingBackward<Element>& arguments,
                                      cudaStream_t stream);

}  // namespace rwkv
