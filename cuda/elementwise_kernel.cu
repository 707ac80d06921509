// gated_residual and relu_squared_, forward and backward. Source: model/ops/gated_residual.h and
// relu_squared.h.
//
// Launch shape: a thread owns eight neighbouring elements, one 16-byte load per tensor in bf16; 256
// threads a block, as many blocks as it takes. The tail goes element by element.
// Floor, bytes an element in bf16: gated_residual 8, backward 10, relu_squared 4, backward 6.
#include "cuda/elementwise_kernel.h"
#include "cuda/launch.h"
#include "cuda/vector_io.cuh"

namespace rwkv {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f));
}

// Calls work(first, count) for this thread's elements.
template <typename Work>
__device__ __forceinline__ void for_own_elements(int64_t size, const Work& work) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (first < size) {
    work(first, size - first);
  }
}
template <typename Element>
__device__ __forceinline__ void load_own(const Element* from, int64_t count, float (&x)[8]) {
  if (count >= kPerThread) {
    load8(from, x);
  } else {
    load_first(from, count, x);
  }
}
template <typename Element>
__device__ __forceinline__ void store_own(Element* to, int64_t count, const float (&x)[8]) {
  if (count >= kPerThread) {
    store8(to, x);
  } else {
    store_first(to, count, x);
  }
}

template <typename Element>
__global__ void __launch_bounds__(kThreads) gated_residual_kernel(const Element* __restrict__ x,
                                                                  const Element* __restrict__ r,
                                                                  const Element* __restrict__ y,
                                                                  Element* __restrict__ out,
                                                                  int64_t size) {
  for_own_elements(size, [&](int64_t first, int64_t count) {
    float x8[8], r8[8], y8[8], out8[8];
    load_own(x + first, count, x8);
    load_own(r + first, count, r8);
    load_own(y + first, count, y8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out8[i] = x8[i] + sigmoid(r8[i]) * y8[i];
    }
    store_own(out + first, count, out8);
  });
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    gated_residual_backward_kernel(const Element* __restrict__ r,
                                   const Element* __restrict__ y,
                                   const Element* __restrict__ dout,
                                   Element* __restrict__ dr,
                                   Element* __restrict__ dy,
                                   int64_t size) {
  for_own_elements(size, [&](int64_t first, int64_t count) {
    float r8[8], y8[8], dout8[8], dr8[8], dy8[8];
    load_own(r + first, count, r8);
    load_own(y + first, count, y8);
    load_own(dout + first, count, dout8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float gate = sigmoid(r8[i]);
      dy8[i] = dout8[i] * gate;
      dr8[i] = dy8[i] * y8[i] * (1.0f - gate);
    }
    store_own(dr + first, count, dr8);
    store_own(dy + first, count, dy8);
  });
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    relu_squared_kernel(Element* __restrict__ x, int64_t size) {
  for_own_elements(size, [&](int64_t first, int64_t count) {
    float x8[8];
    load_own(x + first, count, x8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      // fmaxf would turn a NaN into zero.
      const float positive = x8[i] <= 0.0f ? 0.0f : x8[i];
      x8[i] = positive * positive;
    }
    store_own(x + first, count, x8);
  });
}

template <typename Element>
__global__ void __launch_bounds__(kThreads)
    relu_squared_backward_kernel(Element* __restrict__ h,
                                 const Element* __restrict__ dh,
                                 int64_t size) {
  for_own_elements(size, [&](int64_t first, int64_t count) {
    float h8[8], dh8[8];
    load_own(h + first, count, h8);
    load_own(dh + first, count, dh8);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      h8[i] = 2.0f * sqrtf(h8[i]) * dh8[i];
    }
    store_own(h + first, count, h8);
  });
}

LaunchShape shape_of(int64_t size) {
  return {.grid = dim3(static_cast<unsigned>(ceil_div(size, kThreads * kPerThread))),
          .block = dim3(kThreads)};
}

}  // namespace

template <typename Element>
cudaError_t launch_gated_residual(const Element* x,
                                  const Element* r,
                                  const Element* y,
                                  Element* out,
                                  int64_t size,
                                  cudaStream_t stream) {
  return size == 0
             ? cudaSuccess
             : launch_kernel(
                   &gated_residual_kernel<Element>, shape_of(size), stream, x, r, y, out, size);
}

template <typename Element>
cudaError_t launch_gated_residual_backward(const Element* r,
                                           const Element* y,
                                           const Element* dout,
                                           Element* dr,
                                           Element* dy,
                                           int64_t size,
                                           cudaStream_t stream) {
  return size == 0 ? cudaSuccess
                   : launch_kernel(&gated_residual_backward_kernel<Element>,
                                   shape_of(size),
                                   stream,
                                   r,
                                   y,
                                   dout,
                                   dr,
                                   dy,
                                   size);
}

template <typename Element>
cudaError_t launch_relu_squared(Element* x, int64_t size, cudaStream_t stream) {
  return size == 0 ? cudaSuccess
                   : launch_kernel(&relu_squared_kernel<Element>, shape_of(size), stream, x, size);
}

template <typename Element>
cudaError_t launch_relu_squared_backward(Element* h,
                                         const Element* dh,
                                         int64_t size,
                                         cudaStream_t stream) {
  return size == 0
             ? cudaSuccess
             : launch_kernel(
                   &relu_squared_backward_kernel<Element>, shape_of(size), stream, h, dh, size);
}

#define RWKV_INSTANTIATE(Element)                                                                 \
  template cudaError_t launch_gated_residual(                                                     \
      const Element*, const Element*, const Element*, Element*, int64_t, cudaStream_t);           \
  template cudaError_t launch_gated_residual_backward(                                            \
      const Element*, const Element*, const Element*, Element*, Element*, int64_t, cudaStream_t); \
  template cudaError_t launch_relu_squared(Element*, int64_t, cudaStream_t);                      \
  template cudaError_t launch_relu_squared_backward(                                              \
      Element*, const Element*, int64_t, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv
