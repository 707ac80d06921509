#include "model/formats/tensor_statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

namespace rwkv {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 16;
// Independent sums, which the compiler keeps side by side in vectors.
constexpr size_t kLanes = 16;

constexpr std::array<double, kLanes> filled(double value) {
  std::array<double, kLanes> lanes{};
  lanes.fill(value);
  return lanes;
}

double sum_of(const std::array<double, kLanes>& lanes) {
  return std::accumulate(lanes.begin(), lanes.end(), 0.0);
}

bool is_finite(double value) {
  return std::abs(value) <= std::numeric_limits<double>::max();
}

// Calls `add(lane, value)` for all, neighbours in different lanes.
template <typename T, typename Add>
void for_each_in_lanes(const T* values, size_t number, const Add& add) {
  size_t i = 0;
  for (; i + kLanes <= number; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      add(lane, static_cast<double>(values[i + lane]));
    }
  }
  for (; i < number; ++i) {
    add(0, static_cast<double>(values[i]));
  }
}

class Accumulator {
 public:
  // A piece is read twice, the second time from the cache, for the squares of the distances from
  // its own mean. From the squares of the numbers themselves, those of a narrow spread far from 0
  // would lose all digits of it. Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise
  // algorithm for computing sample variances", 1979, eq. 2.1.
  template <typename T>
  void add(const T* values, size_t number) {
    std::array<double, kLanes> sums{};
    std::array<double, kLanes> counts{};  // as doubles, so that all lanes are of one width
    // Without branches: weights that are not finite are rare, and looked for in gigabytes.
    for_each_in_lanes(values, number, [&](size_t lane, double value) {
      const double counted = is_finite(value) ? value : 0;
      sums[lane] += counted;
      squares_[lane] += counted * counted;
      counts[lane] += is_finite(value) ? 1 : 0;
      nan_[lane] += value != value ? 1 : 0;
      zeros_[lane] += value == 0 ? 1 : 0;
      min_[lane] = is_finite(value) && value < min_[lane] ? value : min_[lane];
      max_[lane] = is_finite(value) && value > max_[lane] ? value : max_[lane];
    });
    const double count = sum_of(counts);
    if (count == 0) {
      return;
    }
    const double mean = sum_of(sums) / count;
    std::array<double, kLanes> distances{};
    for_each_in_lanes(values, number, [&](size_t lane, double value) {
      const double distance = is_finite(value) ? value - mean : 0;
      distances[lane] += distance * distance;
    });
    const double step = mean - mean_;
    distances_ += sum_of(distances) + step * step * finite_ * count / (finite_ + count);
    mean_ += step * count / (finite_ + count);
    finite_ += count;
  }

  TensorStatistics result(int64_t num_elements) const {
    TensorStatistics statistics{.num_elements = num_elements};
    const double nan = sum_of(nan_);
    statistics.num_zeros = static_cast<int64_t>(sum_of(zeros_));
    statistics.num_nan = static_cast<int64_t>(nan);
    statistics.num_infinite = num_elements - static_cast<int64_t>(finite_ + nan);
    if (finite_ > 0) {
      statistics.min = std::ranges::min(min_);
      statistics.max = std::ranges::max(max_);
      statistics.mean = mean_;
      statistics.std = std::sqrt(distances_ / finite_);
      statistics.norm = std::sqrt(sum_of(squares_));
    }
    return statistics;
  }

 private:
  double finite_ = 0;     // number of finite elements
  double mean_ = 0;       // of them
  double distances_ = 0;  // squares of their distances from the mean, summed
  std::array<double, kLanes> squares_{};
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
