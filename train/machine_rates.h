// What this machine reaches, on LibTorch's threads or on a device of it: the rates that floors and
// shares are made of. `runtime` is the device's; null is the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/ops/device_runtime.h"

namespace rwkv {

// Floating-point operations a second of x W^T, the product of a Linear, with 1024^3
// multiplications (8192^3 on a GPU). Takes about 0.1 s.
double matmul_flops_per_s(at::ScalarType dtype, ops::DeviceRuntime* runtime = nullptr);

// Bytes read and written a second where fp32 numbers, more than the caches hold, change in place. A
// copy would move more than it counts: its stores first read what they overwrite.
double update_bytes_per_s(ops::DeviceRuntime* runtime = nullptr);
// Bytes read and bytes written a second of a copy, of more than the caches hold.
double copy_bytes_per_s(ops::DeviceRuntime* runtime = nullptr);
// Bytes a second that a sum over them reads: of more than the caches hold, or of `bytes` of them,
// which may stay there from one sum to the next.
double read_bytes_per_s(ops::DeviceRuntime* runtime = nullptr);
double read_bytes_per_s(int64_t bytes, ops::DeviceRuntime* runtime = nullptr);

}  // namespace rwkv
