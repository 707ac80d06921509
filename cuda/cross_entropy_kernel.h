// Launchers of the loss (model/ops/cross_entropy.h) over rows of logits that are padded.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory; `Element` is float or __nv_bfloat16, arithmetic is fp32.
//   logits   [N, V_padded], rows without gaps; the columns from V on are not part of the softmax,
//            whatever they hold
//   targets  [N], int64, each in [0, V)
//   losses   [N], fp32, in nats
// A row is read fastest where it begins at a multiple of 16 bytes; any other V_padded works, too.
// N = 0 launches nothing. The error is the launch's, or cudaErrorInvalidValue unless
// 1 <= V <= V_padded < 2^31.
//
// A device cannot throw: the loss of a row with a NaN, with +inf, or with a target outside of
// [0, V) is NaN, and so is its whole gradient. -inf is a logit of probability zero.

// losses_n = log sum_v e^{l_nv} - l_n,target.
template <typename Element>
cudaError_t launch_cross_entropy(const Element* logits,
                                 const int64_t* targets,
                                 float* losses,
                                 int64_t N,
                                 int64_t V,
                                 int64_t V_padded,
                                 cudaStream_t stream);

// The same, and writes over each logit
//   scale (softmax(l_n)_v - [v = target_n] + l2wrap max_n [v = argmax_n]),
// max_n the row's largest logit and argmax_n the first place that has it; columns from V on become
// zero. `scale` is the gradient of each loss, such as 1 / N for their mean.
template <typename Element>
cudaError_t launch_cross_entropy_gradient(Element* logits,
                                          const int64_t* targets,
                                          float* losses,
                                          int64_t N,
                                          int64_t V,
                                          int64_t V_padded,
                                          float l2wrap,
                                          float scale,
                                          cudaStream_t stream);

}  // namespace rwkv
