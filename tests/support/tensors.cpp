#include "tests/support/tensors.h"

#include <cstring>

#include <ATen/ATen.h>

#include "data/atomic_file.h"
#include "model/formats/format_registry.h"
#include "model/weights.h"

namespace rwkv::test {
namespace {

// "worst at [1, 2]: 0.5, expected 0.25".
std::string describe_worst(const at::Tensor& actual, const at::Tensor& expected) {
  int64_t flat = (actual - expected).abs().nan_to_num(1e300).argmax().item<int64_t>();
  const double found = actual.flatten()[flat].item<double>();
  const double wanted = expected.flatten()[flat].item<double>();
  std::string index;
  for (int64_t axis = actual.dim() - 1; axis >= 0; --axis) {
    index = std::to_string(flat % actual.size(axis)) + (index.empty() ? "" : ", ") + index;
    flat /= actual.size(axis);
  }
  return c10::str("worst at [", index, "]: ", found, ", expected ", wanted);
}

}  // namespace

std::map<std::string, at::Tensor> load_tensors(const std::string& path) {
  std::map<std::string, at::Tensor> tensors;
  for (const StoredTensor& stored : read_weights(path).tensors) {
    tensors[stored.name] = to_tensor(stored);
  }
  return tensors;
}

at::Tensor load_raw(const std::string& path, at::ScalarType dtype, at::IntArrayRef shape) {
  const std::string bytes = read_text_file(path);
  at::Tensor tensor = at::empty(shape, dtype);
  TORCH_CHECK(bytes.size() == tensor.nbytes(), path, ": ", bytes.size(), " bytes for ", shape);
  std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

double relative_l2(const at::Tensor& actual, const at::Tensor& expected) {
  const at::Tensor wanted = expected.detach().to(at::kDouble);
  return ((actual.detach().to(at::kDouble) - wanted).norm() / wanted.norm()).item<double>();
}

testing::AssertionResult close_l2(const at::Tensor& actual,
                                  const at::Tensor& expected,
                                  double relative) {
  if (actual.sizes() != expected.sizes()) {
    return testing::AssertionFailure() << actual.sizes() << ", expected " << expected.sizes();
  }
  if (actual.numel() == 0) {
    return testing::AssertionSuccess();
  }
  const at::Tensor found = actual.detach().to(at::kDouble);
  const at::Tensor wanted = expected.detach().to(at::kDouble);
  const double error = (found - wanted).norm().item<double>();
  const double size = wanted.norm().item<double>();
  // Written so that a NaN fails.
  if (error <= relative * size) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "relative L2 error " << error / size << ", allowed "
                                     << relative << "; " << describe_worst(found, wanted);
}

testing::AssertionResult close_max(const at::Tensor& actual,
                                   const at::Tensor& expected,
                                   double absolute) {
  if (actual.sizes() != expected.sizes()) {
    return testing::AssertionFailure() << actual.sizes() << ", expected " << expected.sizes();
  }
  const at::Tensor found = actual.detach().to(at::kDouble);
  const at::Tensor wanted = expected.detach().to(at::kDouble);
  const double error = (found - wanted).abs().max().item<double>();
  if (error <= absolute) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << "largest error " << error << ", allowed " << absolute
                                     << "; " << describe_worst(found, wanted);
}

testing::AssertionResult same_bits(const at::Tensor& actual, const at::Tensor& expected) {
  if (actual.sizes() != expected.sizes() || actual.scalar_type() != expected.scalar_type()) {
    return testing::AssertionFailure()
           << actual.scalar_type() << " " << actual.sizes() << ", expected "
           << expected.scalar_type() << " " << expected.sizes();
  }
  const at::Tensor found = actual.detach().contiguous();
  const at::Tensor wanted = expected.detach().contiguous();
  if (std::memcmp(found.const_data_ptr(), wanted.const_data_ptr(), found.nbytes()) == 0) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure()
         << "bits differ; " << describe_worst(found.to(at::kDouble), wanted.to(at::kDouble));
}

}  // namespace rwkv::test
