// How long the program takes to start.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "train/bench/bench.h"

namespace rwkv {

// Starts `program` (a path of rookery) in processes of its own:
//   rookery --help                       until it has ended
//   rookery train, until the first step  until the first line of metrics.jsonl is there, which the
//                                        first step's arithmetic precedes; shape S (L6 D384 V256 B8
//                                        T256), fp32, on a corpus of random bytes
// Both with the file cache warm: each is run once before it is timed. Files lie in a folder of the
// system's temporary directory, removed at the end. No figures beside the times.
// Throws std::runtime_error with what the program wrote to stderr if it fails.
std::vector<BenchRow> bench_startup(const std::string& program, int64_t repeats);

}  // namespace rwkv
