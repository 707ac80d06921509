// Timings of a whole model with random weights and tokens: a training step, and decoding.
#pragma once

#include <cstdint>
#include <string>

#include <ATen/core/ScalarType.h>

#include "model/model_config.h"
#include "model/ops/device_runtime.h"
#include "model/recompute.h"
#include "model/rwkv_model.h"
#include "train/bench/bench.h"
#include "train/bench/step_model.h"
#include "train/run_config.h"

namespace rwkv {

enum class StepDetail { kWhole, kByOp };

struct BenchSettings {
  int64_t repeats = 10;
  ops::DeviceRuntime* runtime = nullptr;  // of the device; null is the CPU
  Recompute recompute = Recompute::kNone;
  int64_t micro_batches = 1;  // of a step, each of the shape's batch
  // Where to write a timeline of three steps more, of a step's benchmark; empty for none.
  std::string trace = {};
};

// A training step as the trainer makes it: forward, backward, then the rest (gradient norm,
// clipping, update). Figures:
//   tokens_per_s, floor_ms (matrix products at the matmul rate, then the optimizer's bytes at the
//   update rate), forward_ms (the head's gradients with it: model/ops/head_loss.h), backward_ms,
//   rest_ms (medians),
//   peak_mb of memory above what the process held before the model, without the code of libraries,
//   and formula_mb: what a plan says beforehand (train/plan.h).
// With kByOp the row has parts, from as many steps more, which a clock at each op slows down a
// little: a row for each kind of op, one for ops of no such kind, and "explained", the whole step
// beside the sum of floors. Figures of a part:
//   percent (of the step; of "explained": of the kinds of op together), calls, gflop, mb, floor_ms
//   (train/bench/step_model.h, at the matmul and the update rate), x_floor (times as long as it).
// Tensors that stay in a cache may go under their floor.
// On another device than the CPU the step is the one that the trainer records, whose parts are not
// timed apart, and memory is that of tensors, planned and found: peak_mb, and reserved_mb with what
// lies between them. kByOp takes one micro-batch.
BenchRow bench_step(const StepShape& shape,
                    at::ScalarType dtype,
                    const BenchSettings& settings,
                    StepDetail detail);

// Two rows, batch 1: a prefill of `prompt_len` tokens in one pass, and one token after another with
// the state handed on. Figures: tokens_per_s, floor_ms (a token: the bytes of the weights it
// reads, at the rate at which as many are read again and again; prefill: the same, or the matrix
// products at the matmul rate where these take longer), peak_mb as of a step, and weights_mb, the
// bytes of all weights.
std::vector<BenchRow> bench_decode(const ModelConfig& config,
                                   int64_t prompt_len,
                                   at::ScalarType dtype,
                                   const BenchSettings& settings);

// ---- What benchmarks of a step share ----

inline constexpr double kBenchL2Wrap = 1e-4;
inline constexpr double kBenchLr = 1e-5;
RwkvModel random_model(const ModelConfig& config, at::ScalarType dtype = at::kFloat);
TrainDtype train_dtype(at::ScalarType dtype);
// "rwkv4 L6 D384 V256 fp32".
std::string describe(const ModelConfig& config, at::ScalarType dtype);
// "step rwkv4 L6 D384 V256 fp32 B8 T256 x 4, mixes recomputed".
std::string step_name(const StepShape& shape, at::ScalarType dtype, const BenchSettings& settings);

}  // namespace rwkv
