#include "model/formats/weight_file.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

struct DtypeRow {
  WeightDtype dtype;
  std::string_view name;
  int64_t bytes;
};

constexpr std::array kDtypes = {
    DtypeRow{WeightDtype::kF64, "f64", 8},
    DtypeRow{WeightDtype::kF32, "f32", 4},
    DtypeRow{WeightDtype::kF16, "f16", 2},
    DtypeRow{WeightDtype::kBf16, "bf16", 2},
    DtypeRow{WeightDtype::kI64, "i64", 8},
    DtypeRow{WeightDtype::kI32, "i32", 4},
    DtypeRow{WeightDtype::kI16, "i16", 2},
    DtypeRow{WeightDtype::kI8, "i8", 1},
    DtypeRow{WeightDtype::kU8, "u8", 1},
    DtypeRow{WeightDtype::kBool, "bool", 1},
};

const DtypeRow& row_of(WeightDtype dtype) {
  for (const DtypeRow& row : kDtypes) {
    if (row.dtype == dtype) {
      return row;
    }
  }
  throw std::logic_error("a weight dtype without a row in kDtypes");
}

// Bytes is the size of an element: a constant here makes each memcpy one load and one store.
template <size_t Bytes>
void gather(const StoredTensor& tensor, std::byte* out) {
  const size_t rank = tensor.shape.size();
  const int64_t inner_size = rank == 0 ? 1 : tensor.shape[rank - 1];
  const int64_t inner_stride = rank == 0 ? 0 : tensor.strides[rank - 1];
  const int64_t rows = tensor.num_elements() / inner_size;
  std::vector<int64_t> index(rank, 0);
  int64_t row_start = tensor.offset;
  for (int64_t row = 0; row < rows; ++row) {
    const std::byte* in = tensor.storage.data() + static_cast<size_t>(row_start) * Bytes;
    for (int64_t i = 0; i < inner_size; ++i) {
      std::memcpy(out, in + static_cast<size_t>(i * inner_stride) * Bytes, Bytes);
      out += Bytes;
    }
    // The next row: like an odometer, over all dimensions but the last.
    for (size_t d = rank; d-- > 1;) {
      row_start += tensor.strides[d - 1];
      if (++index[d - 1] < tensor.shape[d - 1]) {
        break;
      }
      row_start -= tensor.strides[d - 1] * tensor.shape[d - 1];
      index[d - 1] = 0;
    }
  }
}

}  // namespace

std::string_view name_of(WeightDtype dtype) {
  return row_of(dtype).name;
}

int64_t size_of(WeightDtype dtype) {
  return row_of(dtype).bytes;
}

int64_t StoredTensor::num_elements() const {
  // The readers have checked that this does not overflow.
  return checked_num_elements(shape, size_of(dtype));
}

bool StoredTensor::is_contiguous() const {
  if (num_elements() == 0) {
    return true;
  }
  int64_t expected = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    // The stride of a size of 1 is never used.
    if (shape[i] != 1 && strides[i] != expected) {
      return false;
    }
    expected *= shape[i];
  }
  return true;
}

void StoredTensor::copy_to(std::vector<std::byte>& out) const {
  const size_t start = out.size();
  out.resize(start + static_cast<size_t>(num_elements() * size_of(dtype)));
  copy_to(std::span(out).subspan(start));
}

void StoredTensor::copy_to(std::span<std::byte> out) const {
  const auto element_bytes = static_cast<size_t>(size_of(dtype));
  const size_t bytes = static_cast<size_t>(num_elements()) * element_bytes;
  if (out.size() != bytes) {
    throw std::invalid_argument(name + ": copied to " + std::to_string(out.size()) +
                                " bytes, but the tensor " + shape_text(shape) + " has " +
                                std::to_string(bytes));
  }
  if (bytes == 0) {
    return;
  }
  if (is_contiguous()) {
    std::memcpy(out.data(), storage.data() + static_cast<size_t>(offset) * element_bytes, bytes);
    return;
  }
  switch (element_bytes) {
    case 1:
      return gather<1>(*this, out.data());
    case 2:
      return gather<2>(*this, out.data());
    case 4:
      return gather<4>(*this, out.data());
    default:
      return gather<8>(*this, out.data());
  }
}

const StoredTensor* WeightFile::find(std::string_view name) const {
  const auto found = std::find_if(
      tensors.begin(), tensors.end(), [&](const StoredTensor& t) { return t.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

}  // namespace rwkv
