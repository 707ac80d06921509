// Timings of each op of model/ops, forward and backward together.
#pragma once

#include <vector>

#include <ATen/core/ScalarType.h>

#include "train/bench/bench.h"
#include "train/bench/bench_model.h"

namespace rwkv {

// A row for every op at the sizes that a training step of the shape gives it (adamw_: as many
// numbers as the model has parameters; few_rows_linear: the head, for one token). Before each
// timing the caches are filled with something else. Figures:
//   plain_ms  the same maths in Torch's own ops, median of as many repeats, taking turns
//   floor_ms  the bytes of the operands, once, at the update rate or the read rate, whichever is
//             higher (few_rows_linear: the read rate)
//   gb_per_s  bytes that forward and backward read and write, each way counted, over the time; what
//             of that comes from a cache makes it more than the update rate
//   of_copy   the same over the bytes that LibTorch's copy reads and writes in the time
std::vector<BenchRow> bench_ops(const StepShape& shape, at::ScalarType dtype, int64_t repeats);

}  // namespace rwkv
