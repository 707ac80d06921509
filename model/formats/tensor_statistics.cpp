#include "model/formats/tensor_statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace rwkv {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 16;
// Independent sums, which the compiler keeps side by side in vectors.
constexpr size_t kLanes = 16;

class Accumulator {
 public:
  template <typename T>
  void add(const T* values, size_t number) {
    size_t i = 0;
    for (; i + kLanes <= number; i += kLanes) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        add_to(lane, static_cast<double>(values[i + lane]));
      }
    }
    for (; i < number; ++i) {
      add_to(0, static_cast<double>(values[i]));
    }
  }

  TensorStatistics result(int64_t num_elements) const {
    TensorStatistics statistics{.num_elements = num_elements};
    double sum = 0;
    double squares = 0;
    double finite = 0;
    double nan = 0;
    double zeros = 0;
    double min = std::numeric_limits<double>::infinity();
    double max = -min;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      sum += sum_[lane];
      squares += squares_[lane];
      finite += finite_[lane];
      nan += nan_[lane];
      zeros += zeros_[lane];
      min = std::min(min, min_[lane]);
      max = std::max(max, max_[lane]);
    }
    statistics.num_zeros = static_cast<int64_t>(zeros);
    statistics.num_nan = static_cast<int64_t>(nan);
    statistics.num_infinite = num_elements - static_cast<int64_t>(finite + nan);
    if (finite > 0) {
      statistics.min = min;
      statistics.max = max;
      statistics.mean = sum / finite;
      statistics.std =
          std::sqrt(std::max(0.0, squares / finite - statistics.mean * statistics.mean));
      statistics.norm = std::sqrt(squares);
    }
    return statistics;
  }

 private:
  // Without branches: weights that are not finite are rare, and looked for in gigabytes.
  void add_to(size_t lane, double value) {
    const bool is_finite = std::abs(value) <= std::numeric_limits<double>::max();
    const double counted = is_finite ? value : 0;
    sum_[lane] += counted;
    squares_[lane] += counted * counted;
    finite_[lane] += is_finite ? 1 : 0;
    nan_[lane] += value != value ? 1 : 0;
    zeros_[lane] += value == 0 ? 1 : 0;
    min_[lane] = is_finite && value < min_[lane] ? value : min_[lane];
    max_[lane] = is_finite && value > max_[lane] ? value : max_[lane];
  }

  static constexpr std::array<double, kLanes> filled(double value) {
    std::array<double, kLanes> lanes{};
    lanes.fill(value);
    return lanes;
  }

  std::array<double, kLanes> sum_{};
  std::array<double, kLanes> squares_{};
  std::array<double, kLanes> finite_{};  // counts as doubles, so that all lanes are of one width
  std::array<double, kLanes> nan_{};
  std::array<double, kLanes> zeros_{};
  std::array<double, kLanes> min_ = filled(std::numeric_limits<double>::infinity());
  std::array<double, kLanes> max_ = filled(-std::numeric_limits<double>::infinity());
};

template <typename T>
void add_elements(std::span<const std::byte> bytes, Accumulator& accumulator) {
  // Copied, as a file's elements need not be aligned.
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  accumulator.add(values.data(), values.size());
}

void add_piece(std::span<const std::byte> bytes, WeightDtype dtype, Accumulator& accumulator) {
  switch (dtype) {
    case WeightDtype::kF64:
      return add_elements<double>(bytes, accumulator);
    case WeightDtype::kF32:
      return add_elements<float>(bytes, accumulator);
    case WeightDtype::kF16:
    case WeightDtype::kBf16:
      return add_elements<float>(convert_elements(bytes, dtype, WeightDtype::kF32), accumulator);
    case WeightDtype::kI64:
      return add_elements<int64_t>(bytes, accumulator);
    case WeightDtype::kI32:
      return add_elements<int32_t>(bytes, accumulator);
    case WeightDtype::kI16:
      return add_elements<int16_t>(bytes, accumulator);
    case WeightDtype::kI8:
      return add_elements<int8_t>(bytes, accumulator);
    case WeightDtype::kU8:
    case WeightDtype::kBool:
      return add_elements<uint8_t>(bytes, accumulator);
  }
}

}  // namespace

TensorStatistics statistics_of(const StoredTensor& tensor) {
  const int64_t num_elements = tensor.num_elements();
  const auto element_bytes = static_cast<size_t>(size_of(tensor.dtype));
  std::vector<std::byte> copy;
  std::span<const std::byte> bytes;
  if (num_elements > 0 && tensor.is_contiguous()) {
    bytes = tensor.storage.subspan(static_cast<size_t>(tensor.offset) * element_bytes,
                                   static_cast<size_t>(num_elements) * element_bytes);
  } else {
    tensor.copy_to(copy);
    bytes = copy;
  }
  Accumulator accumulator;
  const size_t piece_bytes = static_cast<size_t>(kPieceElements) * element_bytes;
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min(bytes.size(), piece_bytes));
    add_piece(piece, tensor.dtype, accumulator);
    bytes = bytes.subspan(piece.size());
  }
  return accumulator.result(num_elements);
}

}  // namespace rwkv
