// .pth files, zip and legacy containers: read, and every tensor of a moderate size copied.
#include "model/formats/pth.h"
#include "tests/fuzz/fuzz_weights.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed({"a.pth", {data, size}}, rwkv::fuzz::Blame::kFile, [](const std::string& path) {
    rwkv::fuzz::copy_tensors(rwkv::read_pth(path));
  });
  return 0;
}
