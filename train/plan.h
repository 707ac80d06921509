// What a training step will hold in memory, in bytes by kind, from the configuration alone: nothing
// is allocated. No Torch here: it is planned before there is a machine to train on.
//
// Two moments can be the fullest. In the loss all layers have left what backward reads, and a chunk
// of logits lies beside the head's gradients. At the start of backward, or in the first block that
// is computed again, the gradients of a block's tensors come on top, of its ChannelMix or of its
// TimeMix. The plan is of the fuller.
//
// tests/train/test_plan.cpp holds it to the H100's figures in tests/bench/results, and
// tests/python/test_plan.py to what steps on this CPU take.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "model/model_config.h"
#include "train/run_config.h"

namespace rwkv {

enum class PlanDevice { kCpu, kCuda };

// What of a run decides over the memory of one of its processes.
struct StepPlan {
  ModelConfig model;             // resolved; ctx_len is T
  int64_t micro_batch_size = 1;  // sequences of a process at once, 1 or more
  int64_t micro_batches = 1;     // of a process, in a step
  TrainDtype dtype = TrainDtype::kFp32;
  Recompute recompute = Recompute::kNone;
  PlanDevice device = PlanDevice::kCpu;
  int64_t processes = 1;  // that hold the same weights
  // Which states are cut into `processes` parts: 0 none, 1 moments and masters, 2 gradients, too.
  int64_t zero_stage = 0;
  std::vector<std::string> freeze = {};  // patterns, as optimizer.freeze
};

enum class MemoryKind {
  kWeights,      // as forward reads them
  kMasters,      // where they are not the weights: fp32, or what a bf16 weight lacks of it
  kGradients,    // the flat sum; of stage 2 a part, and the buckets that backward has in hand
  kMoments,      // two, fp32
  kActivations,  // what backward reads again, of the layers
  kLogits,       // a chunk of them
  kBuffers,      // what the recurrence and layer norms keep, the head's gradients, those of a block
  kFramework,    // what no tensor holds: the context, workspaces, holes
};
constexpr size_t kNumMemoryKinds = static_cast<size_t>(MemoryKind::kFramework) + 1;
std::string_view name_of(MemoryKind kind);

// Where a step is when it holds the most.
enum class MemoryPeak { kLoss, kBackward };

struct MemoryPlan {
  std::array<double, kNumMemoryKinds> bytes = {};
  MemoryPeak peak = MemoryPeak::kLoss;

  double operator[](MemoryKind kind) const { return bytes[static_cast<size_t>(kind)]; }
  double& operator[](MemoryKind kind) { return bytes[static_cast<size_t>(kind)]; }
  double total() const;
  // Without kFramework: what `rookery bench step` calls peak_mb on a GPU.
  double tensor_bytes() const;
};

// Activations are those of a model without frozen layers, which may keep fewer. Throws
// std::invalid_argument for a version that cannot be planned and for a pattern of `freeze` that
// matches no tensor, or with the others all of them.
MemoryPlan plan_memory(const StepPlan& plan);

// Of all parameters; of those that are trained.
struct ParameterCount {
  int64_t all = 0;
  int64_t trained = 0;
  int64_t largest = 0;  // of a trained tensor
};
ParameterCount count_parameters(const ModelConfig& model, const std::vector<std::string>& freeze);

// Bytes of the gradient that the processes add up, in a step, each time they do.
double gradient_bytes(const StepPlan& plan);

// ---- Constants, for those that print them ---------------------------------------------------

// cuBLAS has 32 MiB for each stream on a Hopper: the first step runs on one, its recording on
// another. They are LibTorch's tensors.
inline constexpr double kCublasBytes = 2 * 32.0 * (1 << 20);
// What LibTorch's pool of GPU memory has beyond its tensors: reserved_mb less peak_mb is 77 to 293
// MB in tests/bench/results/gpu_h100_2026-11.md where blocks are not computed again.
inline constexpr double kPoolBytes = 300e6;
// The CUDA context with the kernels of all libraries, and from two GPUs on NCCL's buffers. Neither
// is a figure of that file: round numbers, meant to be on the safe side.
inline constexpr double kCudaContextBytes = 600e6;
inline constexpr double kNcclBytes = 600e6;
// On the CPU: LibTorch's and oneDNN's own memory, and small tensors, with one thread.
inline constexpr double kCpuFrameworkBytes = 11e6;
// And what steps with products of low ranks were found to hold beyond that in bf16, whatever their
// size.
inline constexpr double kCpuLowRankBytes = 9e6;
// Of stage 2, in sizes of Sharding::bucket_bytes (train/buckets.h): two that are being reduced, and
// two that a gradient fills which lies across their border.
inline constexpr double kBucketsInHand = 4;

}  // namespace rwkv
