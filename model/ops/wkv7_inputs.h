// wkv7_inputs: what RWKV-7's recurrence reads (model/ops/wkv7.h), from what the matrices give.
//
// Per token and head, with alpha = sigmoid(a_raw), the in-context learning rate:
//   p = k k_k          kk = p / max(|p|, 1e-12)      over the head's N channels
//   k' = k (1 + (alpha - 1) k_a)        a = -kk        b = kk alpha
//   v' = v + (v_first - v) sigmoid(v_raw)              v_first: the first layer's v
//
// Backward, with q = sigmoid(v_raw):
//   dkk = alpha db - da            dp = (dkk - kk sum(kk dkk)) / |p|
//   dk = dk' (1 + (alpha - 1) k_a) + k_k dp
//   da_raw = (kk db + dk' k k_a) alpha (1 - alpha)
//   dk_k = sum k dp                dk_a = sum dk' k (alpha - 1)          over all tokens
//   dv = (1 - q) dv'    dv_first = q dv'    dv_raw = dv' (v_first - v) q (1 - q)
// Where |p| is below 1e-12, dp = 1e12 dkk.
// Source: RWKV-7 "Goose", arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/train_temp.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

struct Wkv7InputsOutput {
  at::Tensor k_BTC;  // k'
  at::Tensor v_BTC;  // v'; in the first layer v itself
  at::Tensor a_BTC;
  at::Tensor b_BTC;
};

//   k_BTC, a_raw_BTC, v_BTC  [B, T, C], bf16, fp32 or fp64; the bias is in a_raw
//   v_raw_BTC, v_first_BTC   as they; both undefined in the first layer
//   k_k_C, k_a_C             [C], dtype of k
//   head_size                N, a divisor of C
// All on one device. Registered as rookery::wkv7_inputs and differentiable in all tensors; backward
// saves the inputs. Arithmetic is fp32 (fp64 for fp64 inputs). Sums over tokens have a fixed order:
// two runs give the same bits, whatever the number of threads. Throws c10::Error naming the shapes
// and dtypes that disagree.
Wkv7InputsOutput wkv7_inputs(const at::Tensor& k_BTC,
                             const at::Tensor& a_raw_BTC,
                             const at::Tensor& v_BTC,
                             const at::Tensor& v_raw_BTC,
                             const at::Tensor& v_first_BTC,
                             const at::Tensor& k_k_C,
                             const at::Tensor& k_a_C,
                             int64_t head_size);

}  // namespace rwkv::ops
