// The machine a run is on: what of it decides over speed and memory. Linux alone: read from /proc
// and /sys.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

struct Machine {
  std::string processor;  // as it calls itself, or "unknown processor"
  int64_t cores = 1;      // that this process may run on; a core with two threads counts twice
  // Cores' worth of time that a container may use, if it is limited: 1.5 is one and a half.
  std::optional<double> cpu_quota;
  int64_t memory_bytes = 0;  // of the machine, or of the container where that has less
  // What is there of "avx2", "avx512", "avx512_bf16", "amx_bf16", in that order.
  std::vector<std::string> features;
  std::string system;  // "Linux 6.1.0-18-amd64"

  bool has(std::string_view feature) const;
};

// Files are looked for under `root` ("": the system's own). What cannot be read stays at its
// default; nothing throws.
Machine describe_machine(const std::string& root = "");

// Memory that this process can still take without swapping, in bytes, that of caches included: no
// more than the limits of its control groups and of its address space (ulimit -v) leave. Nothing if
// the system does not say.
std::optional<int64_t> available_memory_bytes(const std::string& root = "");

// The most memory of this process that has been resident so far, in bytes; 0 if the system does not
// say.
int64_t peak_resident_bytes();
// The same without the pages of mapped files, such as the code of libraries; resident now, and the
// most so far.
int64_t anonymous_bytes();
int64_t peak_anonymous_bytes();

// Bytes that this user can still write where `path` is or, if it is not there yet, in the nearest
// folder above it that is. Throws std::runtime_error naming the path and the reason.
int64_t free_disk_bytes(const std::string& path);

}  // namespace rwkv
