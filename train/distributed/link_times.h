// Times what lies between the processes of a run, before it: the operations that training uses,
// over all of them, and each link from one process to another. What arrives is compared with what
// must.
#pragma once

#include <cstdint>

#include "model/ops/device_runtime.h"
#include "train/distributed/communicator.h"
#include "train/distributed/link_report.h"

namespace rwkv {

struct LinkSettings {
  int64_t max_bytes = int64_t{100} << 20;  // of an operation; 64 KiB or more
  ops::DeviceRuntime* runtime = nullptr;   // of the communicator's device; null is the CPU
};

// All processes call it; each gets the report. Operations are timed at 64 KiB, 1 MiB, 16 MiB and
// 100 MiB (a bucket of gradients), as far as max_bytes allows, links at 16 MiB or max_bytes, a slow
// one (slow_link) again.
// A pair of processes at a time, so the time goes with the square of their number: 64 on a network
// of 1 GB/s take 5 minutes.
LinkReport time_links(Communicator& communicator, const LinkSettings& settings);

}  // namespace rwkv
