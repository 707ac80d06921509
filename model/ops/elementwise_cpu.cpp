// CPU kernels of gated_residual and relu_squared_: one pass over memory each, nothing kept between
// elements. Floors in bytes an element of E bytes: gated_residual 4 E forward and 5 E backward,
// relu_squared_ 2 E and 3 E.
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "model/ops/cpu_vector.h"
#include "model/ops/gated_residual.h"
#include "model/ops/relu_squared.h"

namespace rwkv::ops {
namespace {

// Elements a thread takes at least: fewer are quicker done than handed over.
constexpr int64_t kGrain = 1 << 14;

// ---- Bodies -------------------------------------------------------------------------------------

template <typename Element>
RWKV_INLINE void gated_residual_body(
    const Element* x, const Element* r, const Element* y, Element* out, int64_t size) {
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const auto gate = sigmoid_lanes(load_lanes(r + i, count));
    store_lanes(out + i, load_lanes(x + i, count) + gate * load_lanes(y + i, count), count);
  });
}

template <typename Element>
RWKV_INLINE void gated_residual_backward_body(const Element* r,
                                              const Element* y,
                                              const Element* dout,
                                              Element* dr,
                                              Element* dy,
                                              int64_t size) {
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const auto gate = sigmoid_lanes(load_lanes(r + i, count));
    const auto gated = load_lanes(dout + i, count) * gate;
    store_lanes(dy + i, gated, count);
    store_lanes(dr + i, gated * load_lanes(y + i, count) * (1 - gate), count);
  });
}

template <typename Element>
RWKV_INLINE void relu_squared_body(Element* x, int64_t size) {
  using Vector = typename VectorOf<Element>::Vector;
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector value = load_lanes(x + i, count);
    // Written so that a NaN stays one.
    const Vector positive = value <= 0 ? Vector{} : value;
    store_lanes(x + i, positive * positive, count);
  });
}

template <typename Element>
RWKV_INLINE void relu_squared_backward_body(Element* h, const Element* dh, int64_t size) {
  for_each_vector<Element>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const auto root = sqrt_lanes(load_lanes(h + i, count));
    store_lanes(h + i, 2 * root * load_lanes(dh + i, count), count);
  });
}

#define RWKV_KERNELS(Element)                                                                      \
  RWKV_CPU_CLONES void gated_residual_kernel(                                                      \
      const Element* x, const Element* r, const Element* y, Element* out, int64_t size) {          \
    gated_residual_body(x, r, y, out, size);                                                       \
  }                                                                                                \
  RWKV_CPU_CLONES void gated_residual_backward_kernel(const Element* r,                            \
                                                      const Element* y,                            \
                                                      const Element* dout,                         \
                                                      Element* dr,                                 \
                                                      Element* dy,                                 \
                                                      int64_t size) {                              \
    gated_residual_backward_body(r, y, dout, dr, dy, size);                                        \
  }                                                                                                \
  RWKV_CPU_CLONES void relu_squared_kernel(Element* x, int64_t size) {                             \
    relu_squared_body(x, size);                                                                    \
  }                                                                                                \
  RWKV_CPU_CLONES void relu_squared_backward_kernel(Element* h, const Element* dh, int64_t size) { \
    relu_squared_backward_body(h, dh, size);                                                       \
  }
RWKV_KERNELS(float)
RWKV_KERNELS(Bf16)
RWKV_KERNELS(double)
#undef RWKV_KERNELS

// ---- Tensors to pointers ------------------------------------------------------------------------

// Calls `work` with a null pointer of the tensor's element type, for the type alone.
template <typename Work>
void with_element_of(const at::Tensor& tensor, const Work& work) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return work(static_cast<Bf16*>(nullptr));
    case at::kFloat:
      return work(static_cast<float*>(nullptr));
    default:
      return work(static_cast<double*>(nullptr));
  }
}

template <typename Element>
const Element* data_of(Element*, const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}
template <typename Element>
Element* mutable_data_of(Element*, const at::Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

at::Tensor gated_residual_cpu(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y) {
  const at::Tensor out = at::empty_like(x);
  with_element_of(x, [&](auto* type) {
    const auto *x_data = data_of(type, x), *r_data = data_of(type, r), *y_data = data_of(type, y);
    auto* out_data = mutable_data_of(type, out);
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      gated_residual_kernel(
          x_data + begin, r_data + begin, y_data + begin, out_data + begin, end - begin);
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward_cpu(const at::Tensor& r,
                                                               const at::Tensor& y,
                                                               const at::Tensor& dout) {
  const at::Tensor dr = at::empty_like(r);
  const at::Tensor dy = at::empty_like(y);
  with_element_of(r, [&](auto* type) {
    const auto *r_data = data_of(type, r), *y_data = data_of(type, y),
               *dout_data = data_of(type, dout);
    auto *dr_data = mutable_data_of(type, dr), *dy_data = mutable_data_of(type, dy);
    at::parallel_for(0, r.numel(), kGrain, [&](int64_t begin, int64_t end) {
      gated_residual_backward_kernel(r_data + begin,
                                     y_data + begin,
                                     dout_data + begin,
                                     dr_data + begin,
                                     dy_data + begin,
                                     end - begin);
    });
  });
  return {dr, dy};
}

at::Tensor& relu_squared_cpu(at::Tensor& x) {
  with_element_of(x, [&](auto* type) {
    auto* data = mutable_data_of(type, x);
    at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      relu_squared_kernel(data + begin, end - begin);
    });
  });
  return x;
}

at::Tensor& relu_squared_backward_cpu(at::Tensor& h, const at::Tensor& dh) {
  with_element_of(h, [&](auto* type) {
    auto* h_data = mutable_data_of(type, h);
    const auto* dh_data = data_of(type, dh);
    at::parallel_for(0, h.numel(), kGrain, [&](int64_t begin, int64_t end) {
      relu_squared_backward_kernel(h_data + begin, dh_data + begin, end - begin);
    });
  });
  return h;
}

TORCH_LIBRARY_IMPL(rookery, CPU, library) {
  library.impl("gated_residual", &gated_residual_cpu);
  library.impl("gated_residual_backward", &gated_residual_backward_cpu);
  library.impl("relu_squared_", &relu_squared_cpu);
  library.impl("relu_squared_backward_", &relu_squared_backward_cpu);
}

}  // namespace
}  // namespace rwkv::ops
