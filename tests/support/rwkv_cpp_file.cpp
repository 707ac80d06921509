#include "tests/support/rwkv_cpp_file.h"

#include <cstring>
#include <stdexcept>
#include <vector>

#include <ATen/ATen.h>

#include "tests/support/test_data.h"

namespace rwkv::test {

std::map<std::string, at::Tensor> load_rwkv_cpp(const std::string& path) {
  const std::string bytes = read_file(path);
  size_t position = 0;
  const auto take = [&](void* to, size_t count) {
    if (count > bytes.size() - position) {
      throw std::runtime_error(path + ": ends within a tensor");
    }
    std::memcpy(to, bytes.data() + position, count);
    position += count;
  };
  const auto take_number = [&] {
    int32_t number = 0;
    take(&number, sizeof number);
    return number;
  };
  // Magic, version, V, C, L, data type.
  if (take_number() != 0x67676D66) {
    throw std::runtime_error(path + ": not a file of rwkv.cpp");
  }
  position += 5 * sizeof(int32_t);
  std::map<std::string, at::Tensor> tensors;
  while (position < bytes.size()) {
    const int32_t num_axes = take_number(), name_bytes = take_number(), type = take_number();
    if (type != 0) {
      throw std::runtime_error(path + ": a tensor of type " + std::to_string(type) +
                               ", expected 0, FP32");
    }
    std::vector<int64_t> shape(static_cast<size_t>(num_axes));
    for (auto size = shape.rbegin(); size != shape.rend(); ++size) {
      *size = take_number();
    }
    std::string name(static_cast<size_t>(name_bytes), ' ');
    take(name.data(), name.size());
    at::Tensor tensor = at::empty(shape, at::kFloat);
    take(tensor.mutable_data_ptr(), tensor.nbytes());
    tensors[name] = tensor;
  }
  return tensors;
}

void undo_rwkv5_transforms(std::map<std::string, at::Tensor>& tensors) {
  std::map<std::string, at::Tensor> result;
  for (const auto& [name, tensor] : tensors) {
    if (name.ends_with(".time_decay")) {
      result[name] = (-tensor.to(at::kDouble).squeeze(2).log()).log();
    } else if (name.ends_with(".time_faaaa")) {
      result[name] = tensor.squeeze(2);
    } else if (name.ends_with(".time_first")) {
      // The file holds its exponential, which is what time_faaaa is.
      result[name.substr(0, name.size() - 5) + "faaaa"] = tensor.squeeze(2);
    } else if (name.find(".time_mix_") != std::string::npos) {
      result[name] = tensor.view({1, 1, -1});
    } else {
      result[name] = tensor;
    }
  }
  tensors = result;
}

void undo_rwkv6_transforms(std::map<std::string, at::Tensor>& tensors) {
  for (auto& [name, tensor] : tensors) {
    if (name.ends_with(".time_maa_w1") || name.ends_with(".time_decay_w1") ||
        name.ends_with(".time_decay_w2") || name.ends_with(".time_maa_w2")) {
      tensor = tensor.transpose(-1, -2).contiguous();
    } else if (name.ends_with(".time_decay") || name.find(".time_maa_") != std::string::npos) {
      tensor = tensor.view({1, 1, -1});
    } else if (name.ends_with(".time_faaaa")) {
      tensor = tensor.squeeze(2);
    }
  }
}

}  // namespace rwkv::test
