#include "model/formats/checks.h"

#include <algorithm>
#include <stdexcept>

#include <nlohmann/json.hpp>

namespace rwkv {
namespace {

constexpr size_t kShownBytes = 80;

// What is wrong with the names; empty if nothing is.
std::string find_fault(std::span<const std::string_view> names) {
  for (const std::string_view name : names) {
    if (name.size() > kMaxNameBytes) {
      return "the tensor name " + in_quotes(name) + " has " + std::to_string(name.size()) +
             " bytes, expected at most " + std::to_string(kMaxNameBytes);
    }
    if (!is_utf8(name)) {
      return "the tensor name " + in_quotes(name) + " is not UTF-8";
    }
  }
  // Sorting, not hashing: a file cannot make it slow.
  std::vector<std::string_view> sorted(names.begin(), names.end());
  std::sort(sorted.begin(), sorted.end());
  const auto repeated = std::adjacent_find(sorted.begin(), sorted.end());
  if (repeated != sorted.end()) {
    return "two tensors are named " + in_quotes(*repeated) + ", expected names that occur once";
  }
  return "";
}

}  // namespace

std::string in_quotes(std::string_view text) {
  std::string result = "\"";
  for (const char c : text.substr(0, kShownBytes)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      result += c;
    } else {
      result += "\\x";
      result += "0123456789abcdef"[byte >> 4];
      result += "0123456789abcdef"[byte & 15];
    }
  }
  return result + (text.size() > kShownBytes ? "...\"" : "\"");
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

bool is_utf8(std::string_view text) {
  // The JSON library checks UTF-8 when it writes a string, and throws type_error 316.
  try {
    nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::type_error&) {
    return false;
  }
}

int64_t checked_num_elements(std::span<const int64_t> shape, int64_t element_bytes) {
  if (std::any_of(shape.begin(), shape.end(), [](int64_t size) { return size < 0; })) {
    return -1;
  }
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) {
    return 0;
  }
  int64_t bytes = element_bytes;
  for (const int64_t size : shape) {
    if (__builtin_mul_overflow(bytes, size, &bytes)) {
      return -1;
    }
  }
  return bytes / element_bytes;
}

std::vector<int64_t> contiguous_strides(std::span<const int64_t> shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    // A size of 0 counts as 1, as in PyTorch; such a tensor's strides address nothing, and may
    // therefore overflow without harm.
    const auto next = static_cast<uint64_t>(strides[i]);
    strides[i - 1] =
        static_cast<int64_t>(next * static_cast<uint64_t>(std::max(shape[i], int64_t{1})));
  }
  return strides;
}

void check_stored_tensor(const StoredTensor& tensor, const std::string& where) {
  const std::string what = where + ": " + in_quotes(tensor.name) + " of shape " +
                           shape_text(tensor.shape) + ", strides " + shape_text(tensor.strides) +
                           ", offset " + std::to_string(tensor.offset);
  if (tensor.strides.size() != tensor.shape.size()) {
    throw std::runtime_error(what + ": expected as many strides as sizes; the file is damaged");
  }
  const int64_t n = checked_num_elements(tensor.shape, size_of(tensor.dtype));
  if (n < 0 || tensor.offset < 0 ||
      std::any_of(tensor.strides.begin(), tensor.strides.end(), [](int64_t s) { return s < 0; })) {
    throw std::runtime_error(what + ": a number is negative or too large; the file is damaged");
  }
  if (n == 0) {
    return;
  }
  int64_t last = tensor.offset;
  bool overflows = false;
  for (size_t i = 0; i < tensor.shape.size(); ++i) {
    int64_t reach = 0;
    overflows |= __builtin_mul_overflow(tensor.shape[i] - 1, tensor.strides[i], &reach);
    overflows |= __builtin_add_overflow(last, reach, &last);
  }
  const int64_t stored = static_cast<int64_t>(tensor.storage.size()) / size_of(tensor.dtype);
  if (overflows || last >= stored) {
    throw std::runtime_error(what + " reaches outside its storage of " + std::to_string(stored) +
                             " elements; the file is damaged");
  }
}

void check_stored_names(std::span<const std::string_view> names, const std::string& where) {
  const std::string fault = find_fault(names);
  if (!fault.empty()) {
    throw std::runtime_error(where + ": " + fault + "; the file is damaged");
  }
}

void check_tensors_to_write(std::span<const TensorToWrite> tensors, const std::string& where) {
  std::vector<std::string_view> names;
  for (const TensorToWrite& tensor : tensors) {
    names.push_back(tensor.name);
    if (tensor.shape.size() > kMaxRank) {
      throw std::invalid_argument(where + ": " + in_quotes(tensor.name) + " has " +
                                  std::to_string(tensor.shape.size()) +
                                  " dimensions, expected at most " + std::to_string(kMaxRank));
    }
    const int64_t n = checked_num_elements(tensor.shape, size_of(tensor.dtype));
    if (n < 0 || static_cast<uint64_t>(n * size_of(tensor.dtype)) != tensor.data.size()) {
      throw std::invalid_argument(
          where + ": " + in_quotes(tensor.name) + " of shape " + shape_text(tensor.shape) +
          " and dtype " + std::string(name_of(tensor.dtype)) + " was given " +
          std::to_string(tensor.data.size()) + " bytes of data" +
          (n < 0 ? "" : ", expected " + std::to_string(n * size_of(tensor.dtype))));
    }
  }
  const std::string fault = find_fault(names);
  if (!fault.empty()) {
    throw std::invalid_argument(where + ": " + fault);
  }
}

}  // namespace rwkv
