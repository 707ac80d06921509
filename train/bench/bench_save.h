// How fast a checkpoint is written, beside the disk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "train/bench/bench.h"

namespace rwkv {

// Writes a made-up state of about `bytes`, a third of it weights, into a folder of its own in
// `folder`, as training saves it (save_checkpoint), and in turns with that a plain file of as many
// bytes, written 4 MiB at a time, then fsync; each into new files, the last ones removed. Rows: the
// plain file, the checkpoint, and the copy of the state in memory, which is all that a step can
// wait for. Throws std::runtime_error naming the file if there is no room.
std::vector<BenchRow> bench_save(const std::string& folder, int64_t bytes, int64_t repeats);

}  // namespace rwkv
