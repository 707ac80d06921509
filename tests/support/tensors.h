// Golden tensors and their comparison.
#pragma once

#include <map>
#include <string>

#include <ATen/core/Tensor.h>

#include <gtest/gtest.h>

namespace rwkv::test {

// All tensors of a weight file, by name.
std::map<std::string, at::Tensor> load_tensors(const std::string& path);

// Raw little-endian numbers of a file, as a tensor of that shape.
at::Tensor load_raw(const std::string& path, at::ScalarType dtype, at::IntArrayRef shape);

// L2 norm of the difference over that of `expected`, in fp64.
double relative_l2(const at::Tensor& actual, const at::Tensor& expected);

// Passes if the shapes agree and, computed in fp64, the L2 norm of the difference is at most
// `relative` times that of `expected`. Otherwise says so with the worst element and both values.
testing::AssertionResult close_l2(const at::Tensor& actual,
                                  const at::Tensor& expected,
                                  double relative);
// Passes if no element differs by more than `absolute`.
testing::AssertionResult close_max(const at::Tensor& actual,
                                   const at::Tensor& expected,
                                   double absolute);
// Passes if dtype, shape and every bit agree.
testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected);

}  // namespace rwkv::test
