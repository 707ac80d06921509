// gated_residual and relu_squared_ against their definitions in float64.
#include <cmath>

#include "cuda/elementwise_kernel.h"
#include "tests/cuda/kernel_test.h"

namespace rwkv::test {
namespace {

template <typename Element>
class ElementwiseKernel : public testing::Test {};
using Elements = testing::Types<float, __nv_bfloat16>;
TYPED_TEST_SUITE(ElementwiseKernel, Elements);

// A vector of eight, its neighbours, and several blocks with a tail.
constexpr int64_t kSizes[] = {1, 7, 8, 9, 63, 2048, 2049, 5003};

// Of a result that is rounded once.
template <typename Element>
constexpr double kTolerance = sizeof(Element) == 2 ? 4e-3 : 1e-6;

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

TYPED_TEST(ElementwiseKernel, GatedResidualMatchesTheDefinition) {
  for (const int64_t size : kSizes) {
    const Numbers x = rounded<TypeParam>(normal(size, 1)),
                  r = rounded<TypeParam>(normal(size, 2, 3)),
                  y = rounded<TypeParam>(normal(size, 3));
    const auto outputs = same_in_every_order([&] {
      const DeviceArray<TypeParam> dx(x), dr(r), dy(y);
      DeviceArray<TypeParam> out(size);
      expect_launched(
          launch_gated_residual(dx.data(), dr.data(), dy.data(), out.data(), size, nullptr),
          "gated_residual");
      return Outputs{out.numbers()};
    });
    Numbers expected;
    for (size_t i = 0; i < x.size(); ++i) {
      expected.push_back(x[i] + sigmoid(r[i]) * y[i]);
    }
    EXPECT_TRUE(close(outputs[0], expected, kTolerance<TypeParam>)) << size;
  }
}

TYPED_TEST(ElementwiseKernel, GatedResidualBackwardMatchesTheDefinition) {
  for (const int64_t size : kSizes) {
    const Numbers r = rounded<TypeParam>(normal(size, 1, 3)),
                  y = rounded<TypeParam>(normal(size, 2)),
                  dout = rounded<TypeParam>(normal(size, 3));
    const auto outputs = same_in_every_order([&] {
      const DeviceArray<TypeParam> dev_r(r), dev_y(y), dev_dout(dout);
      DeviceArray<TypeParam> dr(size), dy(size);
      expect_launched(
          launch_gated_residual_backward(
              dev_r.data(), dev_y.data(), dev_dout.data(), dr.data(), dy.data(), size, nullptr),
          "gated_residual backward");
      return Outputs{dr.numbers(), dy.numbers()};
    });
    Numbers dr, dy;
    for (size_t i = 0; i < r.size(); ++i) {
      const double gate = sigmoid(r[i]);
      dr.push_back(dout[i] * y[i] * gate * (1 - gate));
      dy.push_back(dout[i] * gate);
    }
    EXPECT_TRUE(close(outputs[0], dr, kTolerance<TypeParam>)) << size;
    EXPECT_TRUE(close(outputs[1], dy, kTolerance<TypeParam>)) << size;
  }
}

TYPED_TEST(ElementwiseKernel, GatesFarFromZeroStayFinite) {
  const Numbers r{-200, 200, -1000, 1000};
  const Numbers one(4, 1.0);
  const DeviceArray<TypeParam> dev_r(r), dev_one(one);
  DeviceArray<TypeParam> out(4), dr(4), dy(4);
  expect_launched(
      launch_gated_residual(dev_one.data(), dev_r.data(), dev_one.data(), out.data(), 4, nullptr),
      "gated_residual");
  EXPECT_EQ(out.numbers(), (Numbers{1, 2, 1, 2}));
  expect_launched(
      launch_gated_residual_backward(
          dev_r.data(), dev_one.data(), dev_one.data(), dr.data(), dy.data(), 4, nullptr),
      "gated_residual backward");
  EXPECT_EQ(dr.numbers(), (Numbers{0, 0, 0, 0}));
  EXPECT_EQ(dy.numbers(), (Numbers{0, 1, 0, 1}));
}

TYPED_TEST(ElementwiseKernel, ReluSquaredMatchesTheDefinition) {
  for (const int64_t size : kSizes) {
    Numbers x = rounded<TypeParam>(normal(size, 1)), dh = rounded<TypeParam>(normal(size, 2));
    x[0] = std::nan("");
    Numbers h, dx;
    const auto outputs = same_in_every_order([&] {
      DeviceArray<TypeParam> dev_x(x);
      expect_launched(launch_relu_squared(dev_x.data(), size, nullptr), "relu_squared");
      return Outputs{dev_x.numbers()};
    });
    for (const double value : x) {
      h.push_back(value <= 0 ? 0 : value * value);
    }
    EXPECT_TRUE(close(outputs[0], h, kTolerance<TypeParam>)) << size;

    // What backward gets is the rounded output.
    const Numbers stored = rounded<TypeParam>(h);
    const auto gradients = same_in_every_order([&] {
      DeviceArray<TypeParam> dev_h(stored);
      const DeviceArray<TypeParam> dev_dh(dh);
      expect_launched(launch_relu_squared_backward(dev_h.data(), dev_dh.data(), size, nullptr),
                      "relu_squared backward");
      return Outputs{dev_h.numbers()};
    });
    for (size_t i = 0; i < x.size(); ++i) {
      dx.push_back(2 * std::sqrt(stored[i]) * dh[i]);
    }
    EXPECT_TRUE(close(gradients[0], dx, kTolerance<TypeParam>)) << size;
  }
}

TYPED_TEST(ElementwiseKernel, NothingIsLaunchedForNoElements) {
  EXPECT_EQ(launch_relu_squared<TypeParam>(nullptr, 0, nullptr), cudaSuccess);
  EXPECT_EQ(launch_gated_residual<TypeParam>(nullptr, nullptr, nullptr, nullptr, 0, nullptr),
            cudaSuccess);
}

}  // namespace
}  // namespace rwkv::test
