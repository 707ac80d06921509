// The lines that a run writes (metrics.jsonl, samples.jsonl, starts.jsonl): one input as all three,
// read and drawn as a report, and metrics.jsonl opened as by a run that goes on.
#include <array>

#include "tests/fuzz/fuzz_file.h"
#include "train/metrics.h"
#include "train/report/report_page.h"
#include "train/report/run_record.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::span<const uint8_t> bytes(data, size);
  const std::array files{rwkv::fuzz::File{"metrics.jsonl", bytes},
                         rwkv::fuzz::File{"samples.jsonl", bytes},
                         rwkv::fuzz::File{"starts.jsonl", bytes}};
  rwkv::fuzz::feed(files, rwkv::fuzz::Blame::kFile, [](const std::string& folder) {
    const std::array runs{rwkv::read_run(folder)};
    rwkv::make_report(runs);
    rwkv::StepFile file(folder + "metrics.jsonl", 5);
    file.append(6, R"({"step": 6})");
  });
  return 0;
}
