// adamw: one pass over flat buffers that updates master weights and moments and writes the weights
// that the model computes with.
//
// With g the gradient times grad_scale, at step n (from 1):
//   m = beta1 m + (1 - beta1) g              v = beta2 v + (1 - beta2) g^2
//   p = p - lr weight_decay p - lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)
// Source: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, as in torch.optim.AdamW.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct AdamwSettings {
  double lr = 0;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double eps = 1e-8;
  double weight_decay = 0;
  double grad_scale = 1;  // the clip factor
  int64_t step = 1;       // n above, 1 or more
};

// All 1-D, contiguous, of one size, on the CPU; master, m, v and grad fp32. master, m and v are
// updated in place; weights, bf16, becomes master rounded (undefined: there are none).
// Registered as rookery::adamw_. Element by element: the result does not depend on threads.
// Throws c10::Error if sizes or dtypes disagree.
void adamw_(at::Tensor& master,
            at::Tensor& m,
            at::Tensor& v,
            const at::Tensor& grad,
            const at::Tensor& weights,
            const AdamwSettings& settings);

// Sum of squares of an fp32 tensor, in double, in an order that does not depend on threads.
double sum_of_squares(const at::Tensor& tensor);

}  // namespace rwkv::ops
