// wkv4: the recurrence of RWKV-4, one weighted average of values per channel.
//
// Per batch row and channel, with w = w_log < 0 and the state (a, b, p) standing for the numerator
// A = a e^p and the denominator B = b e^p:
//   y_t     = (A_t + e^{u+k_t} v_t) / (B_t + e^{u+k_t})
//   A_{t+1} = e^w A_t + e^{k_t} v_t          B_{t+1} = e^w B_t + e^{k_t}
// p is a running maximum that keeps every exponent at or below zero, so k of any size is safe.
//
// Backward, with D_t = B_t + e^{u+k_t}, s_t = dy_t / D_t and the adjoints of A_{t+1} and -B_{t+1}
//   al_{t-1} = e^w al_t + s_t                be_{t-1} = e^w be_t + s_t y_t
//   dv_t = e^{u+k_t} s_t + e^{k_t} al_t
//   dk_t = e^{u+k_t} s_t (v_t - y_t) + e^{k_t} (al_t v_t - be_t)
//   du   = sum_t e^{u+k_t} s_t (v_t - y_t)   dw = sum_t e^w (A_t al_t - B_t be_t)
// With a gate the output is o_t = sigmoid(r_t) y_t: dy_t = sigmoid(r_t) do_t takes dy's place above
// and dr_t = do_t y_t sigmoid(r_t) (1 - sigmoid(r_t)).
// Where a document starts at token t, A_t = B_t = 0 takes the place of what came before it, and
// al_{t-1} = be_{t-1} = 0.
// Source: RWKV paper, arXiv:2305.13048, section 3 and appendix; the stable form as in
// BlinkDL/ChatRWKV RWKV_in_150_lines.py.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct Wkv4Output {
  at::Tensor y_BTA;      // [B, T, A], dtype of k; o where there is a gate
  at::Tensor state_B3A;  // [B, 3, A], dtype of the state: a, b, p after the last token
};

//   w_log_A    [A], fp32 (fp64 if k is fp64), each value < 0: log of the decay per step
//   k_BTA      [B, T, A], bf16, fp32 or fp64; T may be 0: the state is returned as it is
//   v_BTA      as k
//   u_A        [A], dtype of w_log
//   state_B3A  [B, 3, A], dtype of w_log: a, b, p before the first token
//   r_BTA      as k, or undefined for no gate
//   starts_BT  [B, T], bool, or undefined for none: true at the first token of a document. The
//   state
//              before that token is the initial one; the given state serves the tokens before a
//              row's first start. Neither values nor gradients cross a start, not even a NaN.
// All on one device. Registered as rookery::wkv4 and differentiable in w_log, k, v, u, r and in a
// and b of both states; p is a scale, not a quantity: its gradient is zero and the one that comes
// in is ignored, which is exact for every consumer that uses a and b as a e^p and b e^p. Backward
// saves the inputs and recomputes y; a kernel may save more in the registered op's third result,
// `carries`, whose shape is its own affair. The CPU's saves a state for every 16 tokens. Gradients
// of w_log and u are summed over B in a fixed order: two runs give the same bits, whatever the
// number of threads. Throws c10::Error naming both shapes if they disagree, and dtypes that are not
// as above.
Wkv4Output wkv4(const at::Tensor& w_log_A,
                const at::Tensor& k_BTA,
                const at::Tensor& v_BTA,
                const at::Tensor& u_A,
                const at::Tensor& state_B3A,
                const at::Tensor& r_BTA = {},
                const at::Tensor& starts_BT = {});

// p of a state in which a = b = 0: the logarithm of zero, where minus infinity would make inf -
// inf.
inline constexpr double kLogOfNothing = -1e38;

// The state before any token: a = b = 0, p = kLogOfNothing. Options give dtype and device.
at::Tensor wkv4_initial_state(int64_t batch_size,
                              int64_t dim_att,
                              const at::TensorOptions& options);

}  // namespace rwkv::ops
