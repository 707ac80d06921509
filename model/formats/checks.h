// What the readers and writers of every weight format check alike.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/formats/weight_file.h"

namespace rwkv {

// Text from a file as an error may show it: in quotes, at most 80 bytes, bytes that are not
// printable ASCII as \xNN.
std::string in_quotes(std::string_view text);
// "[64, 512]"; "[]" for a scalar.
std::string shape_text(std::span<const int64_t> shape);
bool is_utf8(std::string_view text);

// The product of sizes, 0 if one of them is. Returns -1 if a size is negative or if the elements,
// of `element_bytes` each, would be more than an int64 counts.
int64_t checked_num_elements(std::span<const int64_t> shape, int64_t element_bytes);
// Strides of a contiguous row-major tensor.
std::vector<int64_t> contiguous_strides(std::span<const int64_t> shape);

// Throws std::runtime_error, starting with `where`, unless every element that the tensor addresses
// lies inside its storage.
void check_stored_tensor(const StoredTensor& tensor, const std::string& where);
// RWKV's longest name has 40 bytes.
constexpr size_t kMaxNameBytes = 1024;
// RWKV's tensors have at most 4 dimensions.
constexpr size_t kMaxRank = 8;
// A 14B model has 1,000 tensors. Bounds what a file costs in memory, where a tensor takes hundreds
// of bytes and a pickle names one in ten.
constexpr size_t kMaxTensors = size_t{1} << 16;
// Throws std::runtime_error, starting with `where`, for a name that occurs twice, is not UTF-8 or
// is longer than kMaxNameBytes.
void check_stored_names(std::span<const std::string_view> names, const std::string& where);

// Throws std::invalid_argument, starting with `where`, for a name that check_stored_names would
// refuse, for more than kMaxRank dimensions and for data that does not fit its shape.
void check_tensors_to_write(std::span<const TensorToWrite> tensors, const std::string& where);

}  // namespace rwkv
