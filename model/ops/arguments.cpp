#include "model/ops/arguments.h"

#include <ATen/ATen.h>

namespace rwkv::ops {

void check_sequence(const char* op, const Argument& argument) {
  const at::ScalarType dtype = argument.tensor.scalar_type();
  TORCH_CHECK(argument.tensor.dim() == 3 &&
                  (dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble),
              op,
              ": ",
              argument.name,
              " is ",
              dtype,
              " ",
              argument.tensor.sizes(),
              ", expected [B, T, C] of bfloat16, float or double");
}

void check_like(const char* op, const Argument& argument, const Argument& other) {
  TORCH_CHECK(argument.tensor.sizes() == other.tensor.sizes() &&
                  argument.tensor.scalar_type() == other.tensor.scalar_type(),
              op,
              ": ",
              argument.name,
              " is ",
              argument.tensor.scalar_type(),
              " ",
              argument.tensor.sizes(),
              " but ",
              other.name,
              " is ",
              other.tensor.scalar_type(),
              " ",
              other.tensor.sizes());
}

void check_vector(const char* op,
                  const Argument& argument,
                  at::ScalarType dtype,
                  const Argument& sequence) {
  const int64_t n_embd = sequence.tensor.size(2);
  TORCH_CHECK(argument.tensor.sizes() == at::IntArrayRef({n_embd}) &&
                  argument.tensor.scalar_type() == dtype,
              op,
              ": ",
              argument.name,
              " is ",
              argument.tensor.scalar_type(),
              " ",
              argument.tensor.sizes(),
              ", expected ",
              dtype,
              " [",
              n_embd,
              "] for ",
              sequence.name,
              " ",
              sequence.tensor.sizes());
}

void check_head_state(const char* op, const Argument& argument, const Argument& sequence) {
  const at::Tensor &state = argument.tensor, &x = sequence.tensor;
  const at::ScalarType exact = exact_type(x.scalar_type());
  TORCH_CHECK(state.dim() == 4 && state.size(0) == x.size(0) && state.size(2) == state.size(3) &&
                  state.size(1) * state.size(2) == x.size(2) && state.scalar_type() == exact,
              op,
              ": ",
              argument.name,
              " is ",
              state.scalar_type(),
              " ",
              state.sizes(),
              ", expected ",
              exact,
              " [",
              x.size(0),
              ", H, N, N] with H N = ",
              x.size(2),
              " for ",
              sequence.name,
              " ",
              x.sizes());
}

void check_starts(const char* op, const Argument& argument, const Argument& sequence) {
  const at::Tensor &starts = argument.tensor, &x = sequence.tensor;
  TORCH_CHECK(!starts.defined() ||
                  (starts.sizes() == x.sizes().slice(0, 2) && starts.scalar_type() == at::kBool),
              op,
              ": ",
              argument.name,
              " is ",
              starts.scalar_type(),
              " ",
              starts.sizes(),
              ", expected Bool [B, T] for ",
              sequence.name,
              " ",
              x.sizes());
}

at::ScalarType exact_type(at::ScalarType inputs) {
  return inputs == at::kDouble ? at::kDouble : at::kFloat;
}

std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor.contiguous()) : std::nullopt;
}

}  // namespace rwkv::ops
