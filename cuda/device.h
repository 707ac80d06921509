// What every registration of a CUDA op needs: the stream, pointers, and errors with the op's name.
// The one place that includes c10/cuda.
#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>

#include <cuda_bf16.h>

namespace rwkv {

// Throws if a launch failed: "wkv4 forward, B=8 T=4096 A=768: out of memory". Out of memory throws
// c10::OutOfMemoryError, all else c10::Error.
void check_cuda(cudaError_t error, const std::string& what);

// The same with the text put together only if it is needed.
#define RWKV_CUDA_CHECK(error, ...)                               \
  do {                                                            \
    const cudaError_t rwkv_cuda_error = (error);                  \
    if (rwkv_cuda_error != cudaSuccess) {                         \
      ::rwkv::check_cuda(rwkv_cuda_error, c10::str(__VA_ARGS__)); \
    }                                                             \
  } while (false)

inline cudaStream_t current_stream() {
  return c10::cuda::getCurrentCUDAStream();
}

// Elements of a contiguous tensor as kernels see them; null for an undefined one.
template <typename Element>
const Element* pointer(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const Element*>(tensor.const_data_ptr()) : nullptr;
}
template <typename Element>
const Element* pointer(const std::optional<at::Tensor>& tensor) {
  return tensor ? pointer<Element>(*tensor) : nullptr;
}
template <typename Element>
Element* mutable_pointer(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<Element*>(tensor.mutable_data_ptr()) : nullptr;
}

// Calls work(Element{}) with the type that kernels have for a tensor's numbers; throws c10::Error,
// naming the op, for what no kernel takes.
template <typename Work>
decltype(auto) with_element(const char* op, const at::Tensor& tensor, const Work& work) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16,
              op,
              ": there is no CUDA kernel for ",
              dtype,
              ", expected float or bfloat16; use the CPU");
  return dtype == at::kFloat ? work(float{}) : work(__nv_bfloat16{});
}

}  // namespace rwkv
