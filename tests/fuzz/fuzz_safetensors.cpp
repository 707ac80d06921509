// safetensors files: read, and every tensor used.
#include "model/formats/safetensors.h"
#include "tests/fuzz/fuzz_weights.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed(
      {"a.safetensors", {data, size}}, rwkv::fuzz::Blame::kFile, [](const std::string& path) {
        rwkv::fuzz::use_tensors(rwkv::read_safetensors(path));
      });
  return 0;
}
