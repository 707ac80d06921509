#include "tests/cuda/kernel_test.h"

#include <cmath>
#include <cstring>
#include <random>

#include "tests/cuda/lane_order.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(memory, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(memory, bytes)
#endif

namespace rwkv::test {
namespace {

constexpr size_t kGuardBytes = 512;

double to_double(float x) {
  return x;
}
double to_double(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
double to_double(int32_t x) {
  return x;
}
double to_double(int64_t x) {
  return static_cast<double>(x);
}
double to_double(int16_t x) {
  return x;
}
double to_double(uint8_t x) {
  return x;
}

template <typename Element>
Element from_double(double x) {
  return static_cast<Element>(x);
}
template <>
__nv_bfloat16 from_double<__nv_bfloat16>(double x) {
  return __float2bfloat16_rn(static_cast<float>(x));
}

}  // namespace

Numbers normal(int64_t size, uint64_t seed, double scale) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> distribution;
  Numbers numbers(static_cast<size_t>(size));
  for (double& number : numbers) {
    number = scale * distribution(random);
  }
  return numbers;
}

template <typename Element>
Numbers rounded(const Numbers& numbers) {
  Numbers result;
  for (const double number : numbers) {
    result.push_back(to_double(from_double<Element>(number)));
  }
  return result;
}

template <typename Element>
DeviceArray<Element>::DeviceArray(int64_t size) : size_(size) {
  const size_t bytes = static_cast<size_t>(size) * sizeof(Element);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, bytes + 2 * kGuardBytes), cudaSuccess);
  EXPECT_EQ(cudaMemset(memory, 0xff, bytes + 2 * kGuardBytes), cudaSuccess);
  memory_ = static_cast<char*>(memory);
  data_ = reinterpret_cast<Element*>(memory_ + kGuardBytes);
  ASAN_POISON_MEMORY_REGION(memory_, kGuardBytes);
  ASAN_POISON_MEMORY_REGION(memory_ + kGuardBytes + bytes, kGuardBytes);
}

template <typename Element>
DeviceArray<Element>::DeviceArray(const Numbers& numbers)
    : DeviceArray(static_cast<int64_t>(numbers.size())) {
  std::vector<Element> elements;
  for (const double number : numbers) {
    elements.push_back(from_double<Element>(number));
  }
  EXPECT_EQ(
      cudaMemcpy(data_, elements.data(), numbers.size() * sizeof(Element), cudaMemcpyHostToDevice),
      cudaSuccess);
}

template <typename Element>
DeviceArray<Element>::~DeviceArray() {
  const size_t bytes = static_cast<size_t>(size_) * sizeof(Element) + 2 * kGuardBytes;
  ASAN_UNPOISON_MEMORY_REGION(memory_, bytes);
  std::vector<unsigned char> copy(bytes);
  EXPECT_EQ(cudaMemcpy(copy.data(), memory_, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (copy[i] != 0xff || copy[bytes - 1 - i] != 0xff) {
      ADD_FAILURE() << "a kernel wrote " << (copy[i] != 0xff ? "before" : "behind")
                    << " an array of " << size_;
      break;
    }
  }
  cudaFree(memory_);
}

template <typename Element>
std::vector<Element> DeviceArray<Element>::elements() const {
  std::vector<Element> result(static_cast<size_t>(size_));
  EXPECT_EQ(
      cudaMemcpy(result.data(), data_, result.size() * sizeof(Element), cudaMemcpyDeviceToHost),
      cudaSuccess);
  return result;
}

template <typename Element>
Numbers DeviceArray<Element>::numbers() const {
  Numbers result;
  for (const Element element : elements()) {
    result.push_back(to_double(element));
  }
  return result;
}

testing::AssertionResult close(const Numbers& actual, const Numbers& expected, double relative) {
  if (actual.size() != expected.size()) {
    return testing::AssertionFailure() << actual.size() << " numbers, expected " << expected.size();
  }
  double difference = 0, norm = 0, worst = -1;
  size_t place = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - expected[i]);
    if (std::isnan(error) && !(std::isnan(actual[i]) && std::isnan(expected[i]))) {
      return testing::AssertionFailure()
             << "number " << i << " is " << actual[i] << ", expected " << expected[i];
    }
    if (!std::isnan(error)) {
      difference += error * error;
      norm += expected[i] * expected[i];
    }
    if (error > worst) {
      worst = error;
      place = i;
    }
  }
  if (std::sqrt(difference) <= relative * std::sqrt(norm)) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "relative L2 error " << std::sqrt(difference / norm)
                                     << ", allowed " << relative << "; worst is number " << place
                                     << ": " << actual[place] << ", expected " << expected[place];
}

void expect_launched(cudaError_t error, const char* what) {
  EXPECT_EQ(error, cudaSuccess) << what << ": " << cudaGetErrorString(error);
  const cudaError_t later = cudaDeviceSynchronize();
  EXPECT_EQ(later, cudaSuccess) << what << ": " << cudaGetErrorString(later);
}

Outputs same_in_every_order(const std::function<Outputs()>& work) {
  const Outputs first = work();
  for (const uint64_t seed : {0, 1, 2}) {
    set_lane_order(seed);
    const Outputs again = work();
    set_lane_order(0);
    EXPECT_EQ(again.size(), first.size());
    for (size_t i = 0; i < first.size() && i < again.size(); ++i) {
      EXPECT_TRUE(
          again[i].size() == first[i].size() &&
          (first[i].empty() ||
           std::memcmp(again[i].data(), first[i].data(), first[i].size() * sizeof(double)) == 0))
          << "output " << i << " differs from run to run, lane order " << seed;
    }
  }
  return first;
}

template <>
std::string element_name<float>() {
  return "float";
}
template <>
std::string element_name<__nv_bfloat16>() {
  return "bf16";
}

template Numbers rounded<float>(const Numbers&);
template Numbers rounded<__nv_bfloat16>(const Numbers&);
template class DeviceArray<float>;
template class DeviceArray<__nv_bfloat16>;
template class DeviceArray<int32_t>;
template class DeviceArray<int64_t>;
template class DeviceArray<int16_t>;
template class DeviceArray<uint8_t>;

}  // namespace rwkv::test
