// What the targets of weight files share.
#pragma once

#include <cstddef>
#include <vector>

#include "model/formats/weight_file.h"
#include "tests/fuzz/fuzz_file.h"

namespace rwkv::fuzz {

// Reads every element of the tensors that have few enough not to take the fuzzer's time.
inline void copy_tensors(const WeightFile& file) {
  constexpr int64_t kMostBytes = 1 << 16;
  std::vector<std::byte> bytes;
  for (const StoredTensor& tensor : file.tensors) {
    if (tensor.num_elements() * size_of(tensor.dtype) <= kMostBytes && bytes.size() < 1 << 20) {
      tensor.copy_to(bytes);
    }
  }
}

}  // namespace rwkv::fuzz
