// Tensors to pointers, for model/ops/*_cpu.cpp.
#pragma once

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

#include "model/ops/cpu_vector.h"

namespace rwkv::ops {

template <typename Element>
const Element* data_of(const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}
// Null for none.
template <typename Element>
const Element* data_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? data_of<Element>(*tensor) : nullptr;
}
// Null for an undefined one.
template <typename Element>
Element* mutable_data_of(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<Element*>(tensor.mutable_data_ptr()) : nullptr;
}

// Null stays null.
template <typename Pointer>
Pointer* moved(Pointer* pointer, int64_t by) {
  return pointer == nullptr ? nullptr : pointer + by;
}

// Calls `work.operator()<Element>()` for the tensor's type: Bf16, float or double.
template <typename Work>
void with_element_of(const at::Tensor& tensor, const Work& work) {
  switch (tensor.scalar_type()) {
    case at::kBFloat16:
      return work.template operator()<Bf16>();
    case at::kFloat:
      return work.template operator()<float>();
    default:
      return work.template operator()<double>();
  }
}

}  // namespace rwkv::ops
