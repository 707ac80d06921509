// Whether this machine can train, how well, and what to do about what is wrong: for
// `rookery doctor`. Looking (find_facts) and judging (examine) are apart, so that any machine can
// be judged in a test.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/gpu.h"
#include "train/machine.h"

namespace rwkv {

// LibTorch, as the library of commands that need it found it.
struct LibTorchFacts {
  std::string version;  // "2.11.0"; empty if it could not be loaded
  std::string path;     // of libtorch_cpu.so
  std::string error;    // why it could not be loaded
};

struct DiskFacts {
  std::string folder;
  std::optional<int64_t> free_bytes;
  std::optional<double> write_bytes_per_s;  // until it is on the disk (fsync)
  std::string error;                        // why nothing could be written
  bool is_full = false;                     // that is why
};

struct HealthFacts {
  Machine machine;
  std::optional<int64_t> available_memory_bytes;
  LibTorchFacts libtorch;
  GpuFacts gpu;
  DiskFacts disk;
  std::string vocabulary;        // path of the installed World vocabulary; empty without one
  std::string huge_pages;        // "always", "madvise", "never"; empty if not known
  int64_t open_files_limit = 0;  // files that a program may have open
  std::optional<int64_t> file_size_limit;  // bytes of one file, if limited
};

enum class Verdict {
  kGood,
  kWarning,  // training runs, but slower or not with everything
  kFatal,    // training does not run
};

struct Check {
  std::string name;
  Verdict verdict = Verdict::kGood;
  std::string found;
  std::string advice;  // empty if all is well
};

// Looks at this machine; of the disk at `folder`, into which 64 MB are written, and taken away
// again. All but `libtorch`, which the caller fills. Nothing throws.
HealthFacts find_facts(const std::string& folder);
// Path of a library that this process has loaded, by the start of its file's name; empty if it has
// none.
std::string loaded_library(const std::string& name);

std::vector<Check> examine(const HealthFacts& facts);
bool can_train(const std::vector<Check>& checks);

// A line for each check, one of advice below it where something is wrong, and the outcome.
std::string checks_as_text(const std::vector<Check>& checks);
std::string checks_as_json(const HealthFacts& facts, const std::vector<Check>& checks);

}  // namespace rwkv
