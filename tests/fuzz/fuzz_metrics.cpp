// metrics.jsonl of a run that goes on: opened, and a line appended.
#include "tests/fuzz/fuzz_file.h"
#include "train/metrics.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed(
      {"metrics.jsonl", {data, size}}, rwkv::fuzz::Blame::kFile, [](const std::string& path) {
        rwkv::MetricsFile file(path, 5);
        file.write({.step = 6, .total_steps = 10, .tokens = 60, .loss = 2, .smoothed_loss = 2});
      });
  return 0;
}
