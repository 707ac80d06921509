// What the targets of weight files share.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <vector>

#include "model/formats/tensor_statistics.h"
#include "model/formats/weight_file.h"
#include "tests/fuzz/fuzz_file.h"

namespace rwkv::fuzz {

// Copies every element of the tensors that have few enough not to take the fuzzer's time, and takes
// their statistics: each kind of element is a number, whatever its bits.
inline void use_tensors(const WeightFile& file) {
  constexpr int64_t kMostBytes = 1 << 16;
  std::vector<std::byte> bytes;
  for (const StoredTensor& tensor : file.tensors) {
    if (tensor.num_elements() * size_of(tensor.dtype) <= kMostBytes && bytes.size() < 1 << 20) {
      tensor.copy_to(bytes);
      const TensorStatistics found = statistics_of(tensor);
      const bool has_finite = found.num_nan + found.num_infinite < found.num_elements;
      if (found.num_elements != tensor.num_elements() ||
          (has_finite ? !(found.min <= found.max) : !std::isnan(found.min))) {
        std::abort();
      }
    }
  }
}

}  // namespace rwkv::fuzz
