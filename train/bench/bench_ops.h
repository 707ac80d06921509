// Timings of each op of model/ops, forward and backward together.
#pragma once

#include <vector>

#include <ATen/core/ScalarType.h>

#include "train/bench/bench.h"
#include "train/bench/bench_model.h"

namespace rwkv {

// A row for every op at the sizes that a training step of the shape gives it (adamw_: as many
// numbers as a matrix of the channel mix; few_rows_linear: the head, for one token). Figures:
//   plain_ms  the same maths in Torch's own ops, median of as many repeats, taking turns
//   floor_ms  the bytes that must be read and written, at the copy rate
std::vector<BenchRow> bench_ops(const StepShape& shape, at::ScalarType dtype, int64_t repeats);

}  // namespace rwkv
