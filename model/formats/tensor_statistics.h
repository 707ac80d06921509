// What the numbers of a tensor are like, read from the file piece by piece.
#pragma once

#include <cstdint>

#include "model/formats/weight_file.h"

namespace rwkv {

struct TensorStatistics {
  int64_t num_elements = 0;
  int64_t num_zeros = 0;
  int64_t num_nan = 0;
  int64_t num_infinite = 0;
  // Of the finite elements; all 0 if there is none.
  double min = 0;
  double max = 0;
  double mean = 0;
  double std = 0;   // of the whole, not of a sample: divided by their number
  double norm = 0;  // root of the sum of squares
};

// Any dtype; bool counts as 0 and 1. Reads the data once, in pieces of 256 KB; a tensor that does
// not lie contiguously is copied first.
TensorStatistics statistics_of(const StoredTensor& tensor);

}  // namespace rwkv
