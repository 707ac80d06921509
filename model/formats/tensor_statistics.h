// What the numbers of a tensor are like, read from the file piece by piece.
#pragma once

#include <cstdint>
#include <limits>

#include "model/formats/weight_file.h"

namespace rwkv {

struct TensorStatistics {
  int64_t num_elements = 0;
  int64_t num_zeros = 0;
  int64_t num_nan = 0;
  int64_t num_infinite = 0;
  // Of the finite elements; not a number if there is none.
  double min = std::numeric_limits<double>::quiet_NaN();
  double max = std::numeric_limits<double>::quiet_NaN();
  double mean = std::numeric_limits<double>::quiet_NaN();
  double std = std::numeric_limits<double>::quiet_NaN();   // divided by their number, not one less
  double norm = std::numeric_limits<double>::quiet_NaN();  // root of the sum of squares
};

// Any dtype; bool counts as 0 and 1. Reads the data once, in pieces of 256 KB; a tensor that does
// not lie contiguously is copied first.
TensorStatistics statistics_of(const StoredTensor& tensor);

}  // namespace rwkv
