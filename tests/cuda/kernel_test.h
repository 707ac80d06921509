// What the tests of kernels share. They are compiled twice: with the kernels on the host runner
// (tests/support/host_device.h), which every push runs, and with those that nvcc made, for a
// machine that has a GPU.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <gtest/gtest.h>

namespace rwkv::test {

using Numbers = std::vector<double>;
using Outputs = std::vector<Numbers>;

// Normal numbers times `scale`; the same for the same seed.
Numbers normal(int64_t size, uint64_t seed, double scale = 1);

// The numbers as an element of that type holds them: references are fed what the kernel is fed.
template <typename Element>
Numbers rounded(const Numbers& numbers);

// Numbers in device memory, between guard bands. Under AddressSanitizer the bands may not be
// touched; in any case the destructor fails the test if they have changed.
template <typename Element>
class DeviceArray {
 public:
  // Every byte 0xff, a NaN in floating point: an element left unwritten shows.
  explicit DeviceArray(int64_t size);
  explicit DeviceArray(const Numbers& numbers);
  ~DeviceArray();
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  Element* data() { return data_; }
  const Element* data() const { return data_; }
  int64_t size() const { return size_; }
  Numbers numbers() const;
  std::vector<Element> elements() const;

 private:
  int64_t size_;
  char* memory_;
  Element* data_;
};

// Passes if no number is NaN where `expected` has none, and the L2 norm of the difference is at
// most `relative` times that of `expected`; says the worst place otherwise.
testing::AssertionResult close(const Numbers& actual, const Numbers& expected, double relative);

// Fails the test if the launch did, naming it, or if the device reports an error after it.
void expect_launched(cudaError_t error, const char* what);

// Runs `work`, which returns every output of a kernel, twice and with its lanes in shuffled orders
// (on a GPU: several times), and expects the same bits each time. Returns the outputs.
Outputs same_in_every_order(const std::function<Outputs()>& work);

// "float" or "bf16", for the names of typed tests.
template <typename Element>
std::string element_name();

}  // namespace rwkv::test
