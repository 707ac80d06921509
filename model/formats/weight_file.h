// Named tensors in a file, as every weight format of ours reads and writes them. No Torch here: a
// file is bytes and descriptions, and nothing of a tensor's data is touched before it is asked for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/mapped_file.h"

namespace rwkv {

enum class WeightDtype { kF64, kF32, kF16, kBf16, kI64, kI32, kI16, kI8, kU8, kBool };

// "f32", "bf16", ...; bytes of one element.
std::string_view name_of(WeightDtype dtype);
int64_t size_of(WeightDtype dtype);

// A tensor as it lies in a file: `storage` may be shared with other tensors, strides may be any.
// Every element it addresses lies inside `storage`: the readers have checked it.
struct StoredTensor {
  std::string name;
  WeightDtype dtype = WeightDtype::kF32;
  std::vector<int64_t> shape;          // outermost first; empty for a scalar; a size may be 0
  std::vector<int64_t> strides;        // in elements, as many as sizes, each >= 0
  std::span<const std::byte> storage;  // little-endian elements; not necessarily aligned
  int64_t offset = 0;                  // of the first element, in elements

  int64_t num_elements() const;
  bool is_contiguous() const;
  // Appends the elements in row-major order to `out`.
  void copy_to(std::vector<std::byte>& out) const;
  // Copies them to `out`. Throws std::invalid_argument unless it is num_elements() * size_of(dtype)
  // bytes.
  void copy_to(std::span<std::byte> out) const;
};

// A file opened for reading, or several that hold one model between them; owns what the tensors
// point into.
struct WeightFile {
  std::string path;                                     // of several files: of their folder
  std::string format;                                   // "pth", "pth (legacy)", "safetensors"
  std::vector<StoredTensor> tensors;                    // in file order, names unique
  std::map<std::string, std::string> metadata;          // safetensors' __metadata__; empty for .pth
  std::shared_ptr<const MappedFile> mapping;            // null if there are several files
  std::vector<std::shared_ptr<const void>> parts = {};  // of several files: what holds the tensors

  // Null if there is none of that name.
  const StoredTensor* find(std::string_view name) const;
};

// The same numbers in another floating-point type: f64, f32, f16 and bf16 to each other, rounded to
// nearest with ties to even (f64 to f16 and bf16 by way of f32, as PyTorch does). Too large becomes
// infinity, NaN stays NaN, subnormals are kept. The same type is copied, whichever it is.
// Throws std::invalid_argument for a change from or to another type, and for a number of bytes that
// is not a multiple of the element's.
std::vector<std::byte> convert_elements(std::span<const std::byte> elements,
                                        WeightDtype from,
                                        WeightDtype to);

// A tensor to be written: contiguous, row-major, little-endian.
struct TensorToWrite {
  std::string name;
  WeightDtype dtype = WeightDtype::kF32;
  std::vector<int64_t> shape;
  std::span<const std::byte> data;
};

}  // namespace rwkv
