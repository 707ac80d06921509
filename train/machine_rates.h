// What this machine reaches on LibTorch's threads: the rates that floors and shares are made of.
#pragma once

#include <ATen/core/Tensor.h>

namespace rwkv {

// Floating-point operations a second of x W^T, the product of a Linear, with 1024^3
// multiplications. Takes about 0.1 s.
double matmul_flops_per_s(at::ScalarType dtype);

// Bytes read and written a second by a copy of fp32 numbers larger than the caches.
double copy_bytes_per_s();
// Bytes a second that a sum over them reads.
double read_bytes_per_s();

}  // namespace rwkv
