// safetensors files. Layout, little-endian:
//   0      u64     N, bytes of the header, at most 100,000,000
//   8      N bytes JSON object, may end in spaces: name -> {"dtype": "F32", "shape": [..],
//                  "data_offsets": [begin, end)} relative to the data; optional "__metadata__":
//                  an object of strings
//   8 + N          the data: each tensor contiguous, row-major; together they cover the data
//   without
//                  holes or overlap
// We write the header padded with spaces to a multiple of 8, tensors in the order given.
// Source: huggingface/safetensors, README.md "Format".
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>

#include "model/formats/weight_file.h"

namespace rwkv {

// True if the first bytes look like a safetensors file (a plausible header length, then '{').
bool is_safetensors(std::span<const std::byte> file);
// Throws std::runtime_error for anything that breaks the layout above: a header longer than the
// file, broken JSON, duplicate names, offsets outside the file, a range that does not fit dtype and
// shape, holes, overlap, a dtype we have no use for.
WeightFile read_safetensors(const std::string& path);

// What was written, known without reading it back.
struct WrittenFile {
  uint64_t bytes = 0;
  std::string checksum;  // content_hash() of the file
};
// Throws std::invalid_argument for a name that occurs twice or data that does not fit its shape.
WrittenFile write_safetensors(const std::string& path,
                              std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata);

}  // namespace rwkv
