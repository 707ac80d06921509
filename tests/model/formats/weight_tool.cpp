// Shows weight files to the Python tests.
//   weight_tool list IN         a line for each tensor: name, dtype, sizes, bytes in hex; tabs
//   between weight_tool copy IN OUT     writes the tensors again, in the format that OUT's ending
//   names weight_tool convert A B     elements of type A from standard input, as type B to standard
//   output
#include <cstdio>
#include <exception>
#include <iostream>
#include <iterator>
#include <stdexcept>

#include "model/formats/format_registry.h"

namespace rwkv {
namespace {

void list(const std::string& path) {
  const WeightFile file = read_weights(path);
  for (const StoredTensor& tensor : file.tensors) {
    std::cout << tensor.name << '\t' << name_of(tensor.dtype) << '\t';
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      std::cout << (i == 0 ? "" : ",") << tensor.shape[i];
    }
    std::cout << '\t';
    std::vector<std::byte> bytes;
    tensor.copy_to(bytes);
    for (const std::byte byte : bytes) {
      std::cout << "0123456789abcdef"[std::to_integer<int>(byte >> 4)]
                << "0123456789abcdef"[std::to_integer<int>(byte & std::byte{15})];
    }
    std::cout << '\n';
  }
}

void copy(const std::string& from, const std::string& to) {
  const WeightFile file = read_weights(from);
  std::vector<std::vector<std::byte>> data(file.tensors.size());
  std::vector<TensorToWrite> tensors;
  for (size_t i = 0; i < data.size(); ++i) {
    const StoredTensor& tensor = file.tensors[i];
    tensor.copy_to(data[i]);
    tensors.push_back(
        {.name = tensor.name, .dtype = tensor.dtype, .shape = tensor.shape, .data = data[i]});
  }
  write_weights(to, tensors, file.metadata);
}

WeightDtype dtype_named(std::string_view name) {
  for (const WeightDtype dtype :
       {WeightDtype::kF64, WeightDtype::kF32, WeightDtype::kF16, WeightDtype::kBf16}) {
    if (name_of(dtype) == name) {
      return dtype;
    }
  }
  throw std::invalid_argument(std::string(name) + ": expected f64, f32, f16 or bf16");
}

void convert(const std::string& from, const std::string& to) {
  const std::string in(std::istreambuf_iterator<char>(std::cin), {});
  const std::vector<std::byte> out = convert_elements(
      std::as_bytes(std::span(in.data(), in.size())), dtype_named(from), dtype_named(to));
  std::fwrite(out.data(), 1, out.size(), stdout);
}

}  // namespace
}  // namespace rwkv

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  try {
    if (arguments.size() == 2 && arguments[0] == "list") {
      rwkv::list(arguments[1]);
    } else if (arguments.size() == 3 && arguments[0] == "copy") {
      rwkv::copy(arguments[1], arguments[2]);
    } else if (arguments.size() == 3 && arguments[0] == "convert") {
      rwkv::convert(arguments[1], arguments[2]);
    } else {
      std::cerr << "weight_tool list IN | copy IN OUT | convert FROM TO\n";
      return 2;
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
