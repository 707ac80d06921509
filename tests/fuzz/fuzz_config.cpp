// Run configurations: read, validated, and what is valid written and read back.
#include <cstdlib>

#include "tests/fuzz/fuzz_file.h"
#include "train/run_config.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed({"a.toml", {data, size}}, rwkv::fuzz::Blame::kUser, [](const std::string& path) {
    const rwkv::RunConfig config = rwkv::load_run_config(path, {});
    if (rwkv::parse_run_config(rwkv::to_toml(config), path) != config) {
      std::abort();
    }
  });
  return 0;
}
