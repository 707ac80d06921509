// wkv7_output: from what RWKV-7's recurrence gives to what the output matrix reads: group norm over
// each head, the bonus of the present token, and the gate.
//
// Per token and head, averages over the head's N channels:
//   yhat = (y - mean) rstd      s = sum(r k r_k)      z = yhat weight + bias + s v      out = z g
//
// Backward, with dz = dout g and e = dz weight:
//   dg = dout z        dy = rstd (e - avg(e) - yhat avg(e yhat))       ds = sum(dz v)
//   dr = ds k r_k      dk = ds r r_k      dv = s dz
//   dweight = sum dz yhat      dbias = sum dz      dr_k = sum ds r k            over all tokens
// Source: RWKV-7 "Goose", arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/train_temp.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

//   y_BTC            [B, T, C], bf16, fp32 or fp64: wkv7's
//   r, k, v, g_BTC   as y; k and v as the recurrence had them
//   r_k_HN           [H, N], dtype of y, H N = C
//   weight_C, bias_C [C], dtype of y
// All on one device. Returns a tensor like y. Registered as rookery::wkv7_output and differentiable
// in all tensors; backward saves the inputs. Arithmetic is fp32 (fp64 for fp64 inputs). Sums over
// tokens have a fixed order: two runs give the same bits, whatever the number of threads. Throws
// c10::Error naming the shapes and dtypes that disagree.
at::Tensor wkv7_output(const at::Tensor& y_BTC,
                       const at::Tensor& r_BTC,
                       const at::Tensor& k_BTC,
                       const at::Tensor& v_BTC,
                       const at::Tensor& g_BTC,
                       const at::Tensor& r_k_HN,
                       const at::Tensor& weight_C,
                       const at::Tensor& bias_C,
                       double eps);

}  // namespace rwkv::ops
