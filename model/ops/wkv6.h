// wkv6: the recurrence of RWKV-6 and, with a decay that does not depend on the token, of RWKV-5.2:
// one matrix of state per head.
//
// Per batch row and head, with N channels each and the state S [N keys, N values]:
//   w_t = exp(-exp(w0 + w_raw_t))                 in [0, 1]
//   y_t[j] = sum_i r_t[i] (S_{t-1}[i,j] + u[i] k_t[i] v_t[j])
//   S_t[i,j] = w_t[i] S_{t-1}[i,j] + k_t[i] v_t[j]
//
// Backward, with D_t the gradient of S_t, dy_t that of y_t and q_t = sum_j v_t[j] dy_t[j]:
//   dr_t = S_{t-1} dy_t + u k_t q_t      dk_t = D_t v_t + u r_t q_t
//   dv_t = D_t^T k_t + dy_t sum_i u[i] r_t[i] k_t[i]      du = sum_t r_t k_t q_t
//   dw_t[i] = sum_j D_t[i,j] S_{t-1}[i,j]      D_{t-1} = diag(w_t) D_t + r_t dy_t^T
//   dw_raw_t = dw_t w_t log(w_t)      dw0 = sum_t dw_raw_t
// Where a document starts at token t, S_{t-1} = 0 there and D_{t-1} = 0.
// Source: RWKV-5 and -6, "Eagle and Finch", arXiv:2404.05892; BlinkDL/RWKV-LM RWKV-v5/src/model.py.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct Wkv6Output {
  at::Tensor y_BTC;       // [B, T, C], dtype of r
  at::Tensor state_BHNN;  // [B, H, N, N], dtype of the state: after the last token
};

// What wkv6 reads of each token, [B, T, C] each, C = H N, head h in channels h N ... (h + 1) N - 1.
struct Wkv6Inputs {
  at::Tensor r_BTC;
  at::Tensor w_raw_BTC;  // or undefined: the decay is w0's alone, at every token
  at::Tensor k_BTC;
  at::Tensor v_BTC;
};

//   inputs      all bf16, fp32 or fp64; T may be 0: the state is returned as it is
//   w0_C        [C], fp32 (fp64 if r is fp64): the sum with w_raw is made in that precision
//   u_C         as w0, [H, N] in a row
//   state_BHNN  [B, H, N, N], dtype of w0, the state before the first token, [key, value]. H and N
//               are read from it
//   starts_BT   [B, T], bool, or undefined for none: true at the first token of a document. The
//               state before that token is zero; the given one serves the tokens before a row's
//               first start. Neither values nor gradients cross a start, not even a NaN
// All on one device. Registered as rookery::wkv6 and differentiable in everything but starts.
// Arithmetic is fp32 (fp64 for fp64 inputs). w has no lower bound, so that backward cannot divide
// by it to go back: it saves the inputs and, in the registered op's third result, a state for every
// 16 tokens (empty where no input needs a gradient), and makes the 16 again. At N = 64 the saved
// states cost as much as four fp32 tensors [B, T, C]. The gradients of w0 and u are summed over B
// in a fixed order: two runs give the same bits, whatever the number of threads.
// Throws c10::Error naming both shapes if they disagree, and dtypes that are not as above.
Wkv6Output wkv6(const Wkv6Inputs& inputs,
                const at::Tensor& w0_C,
                const at::Tensor& u_C,
                const at::Tensor& state_BHNN,
                const at::Tensor& starts_BT = {});

}  // namespace rwkv::ops
