// .pth files, zip and legacy containers: read, every tensor of a moderate size used, and the
// checksums compared.
#include "model/formats/pth.h"
#include "tests/fuzz/fuzz_weights.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed({"a.pth", {data, size}}, rwkv::fuzz::Blame::kFile, [](const std::string& path) {
    const rwkv::WeightFile file = rwkv::read_pth(path);
    rwkv::fuzz::use_tensors(file);
    rwkv::verify_checksums(file);
  });
  return 0;
}
