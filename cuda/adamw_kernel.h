// Launchers of the optimizer (model/ops/adamw.h): the gradient's sum of squares, the numbers of a
// step, and the update of all parameters in one launch. Nothing comes back to the host.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory. Launchers allocate nothing; the error is the launch's, or the
// one named.

// Doubles that launch_add_sum_of_squares needs as scratch for n elements.
int64_t sum_of_squares_scratch_size(int64_t n);

// sum = sum + sum_i x_i^2, in an order that depends on n alone.
//   x        [n], float or __nv_bfloat16, of any alignment (fastest from a multiple of 16 bytes)
//   scratch  [sum_of_squares_scratch_size(n)], fp64
//   sum      [1], fp64
// Squares of 16 bytes of neighbours are added in fp32, these sums in fp64: a number beyond 1e18
// makes the sum infinite.
template <typename Element>
cudaError_t launch_add_sum_of_squares(
    const Element* x, int64_t n, double* scratch, double* sum, cudaStream_t stream);

// A step's numbers, in the order of ops::AdamwControl. `lr`, `steps` and the limits are the
// caller's to set.
struct AdamwNumbers {
  double lr;
  double steps;  // updates done
  double loss;
  double gradient_norm;  // before clipping
  double clip;           // min(1, clip_norm / (gradient_norm + 1e-6))
  double skip;           // not 0: no update is made until the caller clears it
  double outlier;        // not 0: this update is not made
  double loss_limit;     // above it a step is an outlier
  double gradient_norm_limit;
};

// From the sum of squares of the whole gradient and the loss, fp64 [1] each: loss, norm and clip
// factor. A loss or norm that is not finite sets skip, and nothing clears it here; one above its
// limit sets outlier, for this step. A step that is neither is counted. clip_norm = 0 turns
// clipping off: the factor is 1.
cudaError_t launch_begin_adamw(AdamwNumbers* numbers,
                               const double* sum_of_squares,
                               const double* loss,
                               double clip_norm,
                               cudaStream_t stream);

struct AdamwFactors {
  double beta1;
  double beta2;
  double eps;
};

constexpr int kMaxAdamwRanges = 16;

// Elements [begin, end) of the buffers, updated alike; fastest if begin is a multiple of 4.
struct AdamwRange {
  int64_t begin;
  int64_t end;
  double lr_scale;
  double weight_decay;
};
struct AdamwRanges {
  int count;  // 0 to kMaxAdamwRanges; they may not overlap
  AdamwRange ranges[kMaxAdamwRanges];
};

// The master weights are fp32, or split into weights and low, which hold
//   bits(master) = bits(weight) * 2^16 + low, low in [-2^15, 2^15)
// so that the weight is the master rounded to nearest, ties away from zero (ties to even would need
// a 17th bit of low). Every number comes back exactly, denormals and infinities too, and a NaN as a
// NaN in both.
template <typename Gradient>
struct AdamwUpdate {
  float* master = nullptr;  // null: split
  // Beside a whole master what it is rounded to, to nearest even; null: there are none.
  __nv_bfloat16* weights = nullptr;
  int16_t* low = nullptr;  // of a split master only
  float* m = nullptr;      // the moments
  float* v = nullptr;
  const Gradient* gradient = nullptr;  // float or __nv_bfloat16
  AdamwRanges ranges{};
  AdamwFactors factors{};
  const AdamwNumbers* numbers = nullptr;  // as launch_begin_adamw has left them
};
// Updates the elements in the ranges; nothing if the numbers say skip or outlier. Arithmetic is
// fp32, each element's own, and the same for a whole and a split master. Buffers must begin at a
// multiple of 16 bytes: cudaErrorMisalignedAddress. cudaErrorInvalidValue for more ranges than the
// table holds.
template <typename Gradient>
cudaError_t launch_adamw(const AdamwUpdate<Gradient>& arguments, cudaStream_t stream);

// Buffers [n] as above.
cudaError_t launch_split_master(
    const float* master, __nv_bfloat16* weights, int16_t* low, int64_t n, cudaStream_t stream);
cudaError_t launch_join_master(const __nv_bfloat16* weights,
                               const int16_t* low,
                               float* master,
                               int64_t n,
                               cudaStream_t stream);

}  // namespace rwkv
