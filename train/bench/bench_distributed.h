// What several processes gain over one: a training step alone and together, in turns.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/ScalarType.h>

#include "train/bench/bench.h"
#include "train/bench/bench_model.h"
#include "train/distributed/communicator.h"
#include "train/distributed/placement.h"

namespace rwkv {

// On the CPU each process has one core, the next one for each local rank of those that the program
// may run on. Throws std::invalid_argument if there are fewer.
void require_core_each(int64_t local_size);
// Binds this process to its core, with all threads that it starts from now on.
void bind_to_own_core(const Placement& placement);

// All processes call it; what it returns on process 0 counts. A step has `settings.micro_batches`.
// On the CPU the shape's batch is that of each, shared out among the processes; on GPUs each
// process has as many sequences, so that one's work stays the same. A timing is of one step, of ten
// on GPUs, which run on without waiting for the host; `settings.repeats` timings of either kind, by
// turns: for the first, process 0 computes alone and the others sleep. Two rows, together and
// alone. Figures:
//   tokens_per_s
//   times_as_fast, percent_of_linear  over alone; as many processes would be as many times as fast
//   waiting_ms, waiting_percent       of a step, the mean over processes: how long operations with
//                                     the others were waited for (CPU)
// The row of all has a part for each process: its own time, and
//   weights_mb, masters_mb, gradients_mb, moments_mb  of its optimizer's buffers
//   states_mb, formula_mb  their sum; what a plan says of it beforehand (train/plan.h)
//   waiting_ms, waiting_percent
// Throws std::invalid_argument if there are more processes than sequences.
std::vector<BenchRow> bench_distributed(Communicator& communicator,
                                        const StepShape& shape,
                                        at::ScalarType dtype,
                                        const BenchSettings& settings,
                                        int64_t zero_stage);

}  // namespace rwkv
