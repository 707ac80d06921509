// wkv7: the recurrence of RWKV-7, one matrix of state per head, updated by a generalised delta
// rule.
//
// Per batch row and head, with N channels each and the state S [N values, N keys]:
//   w_t = exp(-e^{-1/2} sigmoid(w0 + w_raw_t))    in (0.545, 1)
//   u_t = S_{t-1} a_t                             what the state holds under the key a_t
//   S_t = S_{t-1} diag(w_t) + u_t b_t^T + v_t k_t^T
//   y_t = S_t r_t
//
// Backward, with D_t the gradient of S_t and dy_t that of y_t:
//   D_t  = dy_t r_t^T + D_{t+1} diag(w_{t+1}) + du_{t+1} a_{t+1}^T
//   dr_t = S_t^T dy_t    dv_t = D_t k_t    dk_t = D_t^T v_t    db_t = D_t^T u_t    du_t = D_t b_t
//   da_t = S_{t-1}^T du_t       dw_t[j] = sum_i D_t[i,j] S_{t-1}[i,j]
//   dw_raw_t = dw_t w_t log(w_t) (1 - sigmoid(w0 + w_raw_t))      dw0 = sum_t dw_raw_t
// Where a document starts at token t, S_{t-1} = 0 there and D_{t-1} gets nothing from t.
// Source: RWKV-7 "Goose", arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/train_temp.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct Wkv7Output {
  at::Tensor y_BTC;       // [B, T, C], dtype of r
  at::Tensor state_BHNN;  // [B, H, N, N], dtype of the state: after the last token
};

// What wkv7 reads of each token, [B, T, C] each, C = H N, head h in channels h N ... (h + 1) N - 1.
struct Wkv7Inputs {
  at::Tensor r_BTC;
  at::Tensor w_raw_BTC;
  at::Tensor k_BTC;
  at::Tensor v_BTC;
  at::Tensor a_BTC;
  at::Tensor b_BTC;
};

//   inputs      all bf16, fp32 or fp64; T may be 0: the state is returned as it is
//   w0_C        [C], fp32 (fp64 if r is fp64): the sum with w_raw is made in that precision, for
//               1 - w may be as small as 2e-4
//   state_BHNN  [B, H, N, N], dtype of w0, the state before the first token. The first N is the
//               KEY and the second the VALUE: S transposed. H and N are read from it
//   starts_BT   [B, T], bool, or undefined for none: true at the first token of a document. The
//               state before that token is zero; the given one serves the tokens before a row's
//               first start. Neither values nor gradients cross a start, not even a NaN
// All on one device. Registered as rookery::wkv7 and differentiable in everything but starts.
// Backward saves the inputs and, in the registered op's third and fourth results, what it starts
// from; they are empty where no input needs a gradient. The CPU's
// are u [B, T, C] in fp32 and a state for every 64 tokens: at N = 64 each costs as much as an fp32
// tensor [B, T, C]. Within 64 tokens backward makes states again and goes back from every eighth,
// dividing by w: rounding grows by 1.84 a step, 128 times in all. The gradient of w0 is summed over
// B in a fixed order: two runs give the same bits, whatever the number of threads.
// Throws c10::Error naming both shapes if they disagree, and dtypes that are not as above.
Wkv7Output wkv7(const Wkv7Inputs& inputs,
                const at::Tensor& w0_C,
                const at::Tensor& state_BHNN,
                const at::Tensor& starts_BT = {});

}  // namespace rwkv::ops
