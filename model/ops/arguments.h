// What the boundaries of ops do with their arguments alike. Checks throw c10::Error that names the
// op, the argument, what it is and what was expected.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

namespace rwkv::ops {

// As messages name it.
struct Argument {
  const char* name;
  const at::Tensor& tensor;
};

// [B, T, C] of bfloat16, float or double.
void check_sequence(const char* op, const Argument& argument);
// Shape and dtype of another argument.
void check_like(const char* op, const Argument& argument, const Argument& other);
// One element for each of the sequence's channels: [C].
void check_vector(const char* op,
                  const Argument& argument,
                  at::ScalarType dtype,
                  const Argument& sequence);
// The state of matrices a head that goes with the sequence: [B, H, N, N] with H N = C.
void check_head_state(const char* op, const Argument& argument, const Argument& sequence);
// Where documents start in the sequence: undefined, or bool [B, T].
void check_starts(const char* op, const Argument& argument, const Argument& sequence);

// In which sums and states of inputs of this type are held: fp32, or fp64 if they are.
at::ScalarType exact_type(at::ScalarType inputs);

// Contiguous; nothing for an undefined one.
std::optional<at::Tensor> if_defined(const at::Tensor& tensor);

}  // namespace rwkv::ops
