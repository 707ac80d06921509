// adamw: one pass over flat buffers that updates master weights and moments and writes the weights
// that the model computes with; and the few numbers of a step, which stay on the device, so that
// nothing waits for them.
//
// With g the gradient times the clip factor c = min(1, clip_norm / (norm + 1e-6)), as
// torch.nn.utils.clip_grad_norm_, at step n (from 1):
//   m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
//   p = p - lr weight_decay p - lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
// Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, as in torch.optim.AdamW.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct AdamwSettings {
  double beta1 = 0.9;
  double beta2 = 0.99;
  double eps = 1e-8;
  double clip_norm = 0;  // 0: off
};

// Elements [begin, end) of the buffers, updated alike.
struct AdamwGroup {
  int64_t begin = 0;
  int64_t end = 0;
  double lr_scale = 1;
  double weight_decay = 0;
};

// At most so many in one call.
inline constexpr size_t kMaxAdamwGroups = 16;

// All 1-D, contiguous, on one device, 16-byte aligned; master, m, v and gradient of at least as
// many elements as the groups reach.
struct AdamwBuffers {
  at::Tensor master;    // fp32; undefined: it is in weights and low
  at::Tensor weights;   // bf16, becomes master rounded; undefined: the model computes with master
  at::Tensor low;       // int16, with weights the master (see split_master); else undefined
  at::Tensor m;         // fp32
  at::Tensor v;         // fp32
  at::Tensor gradient;  // fp32 or bf16
};

// Places in the tensor of a step's numbers, fp64. `lr`, `steps` and the limits are the caller's to
// set.
enum AdamwControl : int64_t {
  kControlLr,
  kControlSteps,         // updates done
  kControlLoss,          // of the step, as it was handed in
  kControlGradientNorm,  // before clipping
  kControlClip,          // the factor c
  kControlSkip,     // not 0: loss or norm was not finite, and no update is made until it is cleared
  kControlOutlier,  // not 0: loss or norm was above its limit, and this update is not made
  kControlLossLimit,
  kControlGradientNormLimit,
  kControlSize
};
// Without limits: they are infinite.
at::Tensor make_adamw_control(const at::TensorOptions& options);

// Adds the sum of squares of a contiguous fp32 or bf16 tensor to `sum`, an fp64 scalar, in an order
// that does not depend on threads.
void add_sum_of_squares(const at::Tensor& tensor, at::Tensor& sum);

// From the sum of squares of the whole gradient and the loss (fp32 or fp64 scalars): norm, clip
// factor, and whether the step is skipped or an outlier; one more update is counted unless it is.
void begin_adamw(at::Tensor& control,
                 const at::Tensor& sum_of_squares,
                 const at::Tensor& loss,
                 const AdamwSettings& settings);

// The update, with the numbers that begin_adamw left in control; nothing if the step is skipped or
// an outlier.
// Registered as rookery::adamw_. Element by element: the result does not depend on threads. Throws
// c10::Error if sizes or dtypes disagree.
void adamw_(AdamwBuffers& buffers,
            const std::vector<AdamwGroup>& groups,
            const at::Tensor& control,
            const AdamwSettings& settings);

// An fp32 master as a bf16 weight and 16 bits more, which saves a copy of the weights:
//   bits(master) = bits(weight) * 2^16 + low, low in [-2^15, 2^15)
// so that the weight is the master rounded to nearest, ties away from zero (the other way round low
// would need a 17th bit). Exact for every finite master that does not round to infinity.
void split_master(const at::Tensor& master, at::Tensor& weights, at::Tensor& low);
at::Tensor join_master(const at::Tensor& weights, const at::Tensor& low);

}  // namespace rwkv::ops
