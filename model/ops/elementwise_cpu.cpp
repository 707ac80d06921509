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
#include "model/ops/tensor_data.h"

namespace rwkv::ops {
namespace {

// Elements a thread takes at least: fewer are quicker done than handed over.
constexpr int64_t kGrain = 1 << 14;

// ---- Bodies -------------------------------------------------------------------------------------

template <typename Vector, typename Element>
RWKV_INLINE void gated_residual_body(
    const Element* x, const Element* r, const Element* y, Element* out, int64_t size) {
  for_each_vector<Vector>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector gate = sigmoid_lanes(load_lanes<Vector>(r + i, count));
    const Vector gated = gate * load_lanes<Vector>(y + i, count);
    store_lanes(out + i, load_lanes<Vector>(x + i, count) + gated, count);
  });
}

template <typename Vector, typename Element>
RWKV_INLINE void gated_residual_backward_body(const Element* r,
                                              const Element* y,
                                              const Element* dout,
                                              Element* dr,
                                              Element* dy,
                                              int64_t size) {
  for_each_vector<Vector>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector gate = sigmoid_lanes(load_lanes<Vector>(r + i, count));
    const Vector gated = load_lanes<Vector>(dout + i, count) * gate;
    store_lanes(dy + i, gated, count);
    store_lanes(dr + i, gated * load_lanes<Vector>(y + i, count) * (1 - gate), count);
  });
}

template <typename Vector, typename Element>
RWKV_INLINE void relu_squared_body(Element* x, int64_t size) {
  for_each_vector<Vector>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector value = load_lanes<Vector>(x + i, count);
    // Written so that a NaN stays one.
    const Vector positive = value <= 0 ? Vector{} : value;
    store_lanes(x + i, positive * positive, count);
  });
}

template <typename Vector, typename Element>
RWKV_INLINE void relu_squared_backward_body(Element* h, const Element* dh, int64_t size) {
  for_each_vector<Vector>(size, [&](int64_t i, int64_t count) RWKV_INLINE_LAMBDA {
    const Vector root = sqrt_lanes(load_lanes<Vector>(h + i, count));
    store_lanes(h + i, 2 * root * load_lanes<Vector>(dh + i, count), count);
  });
}

// ---- Tensors to pointers ------------------------------------------------------------------------

// Calls `body(a vector, first, count)` for stretches of `size` elements, in parallel.
template <typename Element, typename Body>
void for_each_stretch(int64_t size, const Body& body) {
  at::parallel_for(0, size, kGrain, [&](int64_t begin, int64_t end) {
    with_vectors<ScalarOf<Element>>([&](auto vector)
                                        RWKV_INLINE_LAMBDA { body(vector, begin, end - begin); });
  });
}

at::Tensor gated_residual_cpu(const at::Tensor& x, const at::Tensor& r, const at::Tensor& y) {
  const at::Tensor out = at::empty_like(x);
  with_element_of(x, [&]<typename Element>() {
    const auto *x_data = data_of<Element>(x), *r_data = data_of<Element>(r),
               *y_data = data_of<Element>(y);
    auto* out_data = mutable_data_of<Element>(out);
    for_each_stretch<Element>(
        x.numel(),
        [&]<typename Vector>(As<Vector>, int64_t first, int64_t size) RWKV_INLINE_LAMBDA {
          gated_residual_body<Vector>(
              x_data + first, r_data + first, y_data + first, out_data + first, size);
        });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> gated_residual_backward_cpu(const at::Tensor& r,
                                                               const at::Tensor& y,
                                                               const at::Tensor& dout) {
  const at::Tensor dr = at::empty_like(r);
  const at::Tensor dy = at::empty_like(y);
  with_element_of(r, [&]<typename Element>() {
    const auto *r_data = data_of<Element>(r), *y_data = data_of<Element>(y),
               *dout_data = data_of<Element>(dout);
    auto *dr_data = mutable_data_of<Element>(dr), *dy_data = mutable_data_of<Element>(dy);
    for_each_stretch<Element>(r.numel(),
                              [&]<typename Vector>(As<Vector>, int64_t first, int64_t size)
                                  RWKV_INLINE_LAMBDA {
                                    gated_residual_backward_body<Vector>(r_data + first,
                                                                         y_data + first,
                                                                         dout_data + first,
                                                                         dr_data + first,
                                                                         dy_data + first,
                                                                         size);
                                  });
  });
  return {dr, dy};
}

at::Tensor& relu_squared_cpu(at::Tensor& x) {
  with_element_of(x, [&]<typename Element>() {
    auto* data = mutable_data_of<Element>(x);
    for_each_stretch<Element>(
        x.numel(),
        [&]<typename Vector>(As<Vector>, int64_t first, int64_t size)
            RWKV_INLINE_LAMBDA { relu_squared_body<Vector>(data + first, size); });
  });
  return x;
}

at::Tensor& relu_squared_backward_cpu(at::Tensor& h, const at::Tensor& dh) {
  with_element_of(h, [&]<typename Element>() {
    auto* h_data = mutable_data_of<Element>(h);
    const auto* dh_data = data_of<Element>(dh);
    for_each_stretch<Element>(
        h.numel(),
        [&]<typename Vector>(As<Vector>, int64_t first, int64_t size) RWKV_INLINE_LAMBDA {
          relu_squared_backward_body<Vector>(h_data + first, dh_data + first, size);
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
