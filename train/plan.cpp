#include "train/plan.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "model/ops/head_chunks.h"
#include "model/version_shapes.h"
#include "train/buckets.h"

namespace rwkv {
namespace {

using ops::ceil_div;
using ops::round_up;

constexpr double kFloat = sizeof(float);

bool is_half(const StepPlan& plan) {
  return plan.dtype == TrainDtype::kBf16;
}
double element_size(const StepPlan& plan) {
  return is_half(plan) ? 2 : kFloat;
}
bool on_gpu(const StepPlan& plan) {
  return plan.device == PlanDevice::kCuda;
}

// A GPU keeps the gradient of a single bf16 backward pass as that leaves it (train/optimizer.h).
double gradient_element_size(const StepPlan& plan) {
  return on_gpu(plan) && is_half(plan) && plan.micro_batches == 1 ? 2 : kFloat;
}

// As train/optimizer.h lays them out. The two vectors of a layer that stay fp32 in a bf16 model are
// counted as the others, and the space between parameters is not: a ten thousandth of a model.
void add_states(const StepPlan& plan, MemoryPlan& memory) {
  const ParameterCount count = count_parameters(plan.model, plan.freeze);
  const auto all = static_cast<double>(count.all);
  const auto trained = static_cast<double>(count.trained);
  const auto parts = static_cast<double>(plan.processes);
  const double state_parts = plan.zero_stage >= 1 ? parts : 1;
  memory[MemoryKind::kWeights] = all * element_size(plan);
  if (is_half(plan)) {
    // A GPU splits the fp32 master into the bf16 weight and 16 bits more.
    memory[MemoryKind::kMasters] = all * (on_gpu(plan) ? 2 : kFloat) / state_parts;
  }
  memory[MemoryKind::kMoments] = trained * 2 * kFloat / state_parts;
  const double gradients = trained * gradient_element_size(plan);
  if (plan.zero_stage >= 2) {
    // A tensor that is larger than a bucket has all that it lies in at once.
    const auto bucket = static_cast<double>(Sharding().bucket_bytes);
    const double largest = static_cast<double>(count.largest) * gradient_element_size(plan);
    const double in_hand = std::max(kBucketsInHand, std::ceil(largest / bucket) + 1);
    memory[MemoryKind::kGradients] = gradients / parts + std::min(gradients, in_hand * bucket);
  } else {
    memory[MemoryKind::kGradients] = gradients;
  }
}

// On a CPU, where processes exchange parts with each other (train/distributed/communicator.cpp):
// the others' parts of the buckets that are under way, from ZeRO stage 1 on.
double exchange_bytes(const StepPlan& plan) {
  if (on_gpu(plan) || plan.processes == 1 || plan.zero_stage == 0) {
    return 0;
  }
  const auto parts = static_cast<double>(plan.processes);
  const double under_way =
      std::min(gradient_bytes(plan), 2 * static_cast<double>(Sharding().bucket_bytes));
  return under_way * (parts - 1) / parts;
}

// Sizes that the activations of one micro-batch are made of, in bytes.
struct Activations {
  double plane = 0;   // [B, T, C]
  double hidden = 0;  // [B, T, F]
  double block = 0;   // what a block keeps
  double mixes = 0;   // of it, mixed inputs, and of these ChannelMix's
  double channel_mixes = 0;
  // What a block's ops keep beside its tensors of B and T.
  double kept_by_ops = 0;
  double states = 0;          // before and after the batch, of all layers
  double largest_matrix = 0;  // the gradient of a block's
  // What backward holds in a block's ChannelMix beside the hidden row's gradient and a matrix's,
  // and what it has let go of by then.
  double in_channel_mix = 0;
  // The same in its TimeMix, whose mixed inputs are then there again.
  double in_time_mix = 0;
  // What the first block lacks of the others' tensors.
  double first_block_lacks = 0;
  // What all blocks read of the first.
  double from_first_block = 0;
};

Activations common_activations(const StepPlan& plan) {
  const ModelConfig& model = plan.model;
  const double tokens =
      static_cast<double>(plan.micro_batch_size) * static_cast<double>(model.ctx_len);
  const double size = element_size(plan);
  const auto widest = static_cast<double>(std::max(model.dim_ffn, model.dim_att));
  Activations a;
  a.plane = tokens * static_cast<double>(model.n_embd) * size;
  a.hidden = tokens * static_cast<double>(model.dim_ffn) * size;
  // Mean and rstd of both norms.
  a.kept_by_ops = 2 * 2 * tokens * kFloat;
  a.largest_matrix = static_cast<double>(model.n_embd) * widest * size;
  return a;
}

Activations rwkv4_activations(const StepPlan& plan) {
  const ModelConfig& model = plan.model;
  const auto A = static_cast<double>(model.dim_att);
  const auto B = static_cast<double>(plan.micro_batch_size);
  Activations a = common_activations(plan);
  const double wide_plane = a.plane / static_cast<double>(model.n_embd) * A;
  // x; the mixed inputs of r, k and v; r, k and v and the gated wkv; the sum with attention; the
  // mixed inputs of r and k; the hidden row; r and its partner.
  a.block = 9 * a.plane + 4 * wide_plane + a.hidden;
  a.mixes = 5 * a.plane;
  a.channel_mixes = 2 * a.plane;
  // States that backward of wkv4 starts from: on the CPU one for every 16 tokens
  // (model/ops/wkv4_cpu.cpp), on a GPU for every 128 (kWkv4CarryLen in cuda/wkv4_kernel.h).
  const int64_t carry_len = on_gpu(plan) ? 128 : 16;
  a.kept_by_ops += B * static_cast<double>(ceil_div(model.ctx_len, carry_len) + 1) * 3 * A * kFloat;
  a.states = static_cast<double>(model.n_layer) * 2 * B *
             (2 * static_cast<double>(model.n_embd) * element_size(plan) + 3 * A * kFloat);
  // The gradients of the block's output, of r and of its partner, less r and its partner.
  a.in_channel_mix = a.plane;
  return a;
}

// RWKV-5 and -6: what wkv6 keeps, a state for every 16 tokens (model/ops/wkv6_cpu.cpp), what group
// norm keeps, two numbers of each head, and the states.
void add_wkv6(const StepPlan& plan, Activations& a) {
  const ModelConfig& model = plan.model;
  const auto A = static_cast<double>(model.dim_att);
  const auto N = static_cast<double>(model.head_size);
  const auto B = static_cast<double>(plan.micro_batch_size);
  const double state = B * A * N * kFloat;
  a.kept_by_ops += state * static_cast<double>(ceil_div(model.ctx_len, int64_t{16}));
  a.kept_by_ops += 2 * B * static_cast<double>(model.ctx_len) * A / N * element_size(plan);
  a.states = static_cast<double>(model.n_layer) * 2 *
             (2 * B * static_cast<double>(model.n_embd) * element_size(plan) + state);
  // As RWKV-4's, whose ChannelMix they have.
  a.in_channel_mix = a.plane;
}

Activations rwkv5_activations(const StepPlan& plan) {
  const ModelConfig& model = plan.model;
  Activations a = common_activations(plan);
  const double wide_plane =
      a.plane / static_cast<double>(model.n_embd) * static_cast<double>(model.dim_att);
  // x; the mixed inputs of k, v, r and g; the sum with attention; the mixed inputs of k and r; r
  // and its partner. r, k and v; y and its norm; g and its silu; what the output matrix reads.
  a.block = 10 * a.plane + 8 * wide_plane + a.hidden;
  a.mixes = 6 * a.plane;
  a.channel_mixes = 2 * a.plane;
  add_wkv6(plan, a);
  return a;
}

Activations rwkv6_activations(const StepPlan& plan) {
  const ModelConfig& model = plan.model;
  Activations a = common_activations(plan);
  const double column = a.plane / static_cast<double>(model.n_embd);
  const double wide_plane = column * static_cast<double>(model.dim_att);
  const auto ranks = static_cast<double>(5 * model.rank_mix + model.rank_decay);
  // x; its mix; the difference to the token before; five shares of it, and five mixed inputs; the
  // sum with attention; the mixed inputs of k and r; r and its partner. w, r, k and v; y and its
  // norm; g and its silu; what the output matrix reads. Then what is between the low ranks.
  a.block = 18 * a.plane + 9 * wide_plane + ranks * column + a.hidden;
  a.mixes = 3 * a.plane;
  a.channel_mixes = 2 * a.plane;
  add_wkv6(plan, a);
  return a;
}

Activations rwkv7_activations(const StepPlan& plan) {
  const ModelConfig& model = plan.model;
  const auto C = static_cast<double>(model.n_embd);
  const auto N = static_cast<double>(model.head_size);
  const auto B = static_cast<double>(plan.micro_batch_size);
  Activations a = common_activations(plan);
  const double column = a.plane / C;
  const auto ranks =
      static_cast<double>(model.rank_decay + model.rank_iclr + model.rank_value + model.rank_gate);
  // x; six mixed inputs; r, k and v; what the low ranks come to: w, a, v and g; what the recurrence
  // reads: k, v, a and b; y; what the output matrix reads; the sum with attention; the mixed input
  // of k. Then what is between the low ranks, and the hidden row.
  a.block = 22 * a.plane + ranks * column + a.hidden;
  a.mixes = 7 * a.plane;
  a.channel_mixes = a.plane;
  // u of wkv7, and the states that its backward starts from: on the CPU one for every 64 tokens
  // (model/ops/wkv7_cpu.cpp), on a GPU for every 32 and the last (kWkv7CarryLen in
  // cuda/wkv7_kernel.h).
  const int64_t carries = on_gpu(plan) ? ceil_div(model.ctx_len, int64_t{32}) + 1
                                       : ceil_div(model.ctx_len, int64_t{64});
  a.kept_by_ops +=
      B * C * kFloat * (static_cast<double>(model.ctx_len) + static_cast<double>(carries) * N);
  a.states =
      static_cast<double>(model.n_layer) * 2 * B * (2 * C * element_size(plan) + C * N * kFloat);
  // The gradient of the block's output.
  a.in_channel_mix = a.plane;
  // In wkv7's backward: the gradient of the sum with attention; five that wkv7_output left, and six
  // more; less g, y, what the output matrix read, and what ChannelMix had.
  a.in_time_mix = (1 + 5 + 6 - 3 - 1) * a.plane - a.hidden;
  // The share of the first layer's v; and v, which is that.
  a.first_block_lacks = 2 * a.plane;
  a.from_first_block = a.plane;
  return a;
}

struct VersionActivations {
  std::string_view version;
  Activations (*of)(const StepPlan& plan);
};
constexpr std::array<VersionActivations, 4> kVersions{{{"rwkv4", &rwkv4_activations},
                                                       {"rwkv5", &rwkv5_activations},
                                                       {"rwkv6", &rwkv6_activations},
                                                       {"rwkv7", &rwkv7_activations}}};

Activations activations_of(const StepPlan& plan) {
  const auto found = std::ranges::find(kVersions, plan.model.version, &VersionActivations::version);
  if (found == kVersions.end()) {
    throw std::invalid_argument("model.version = \"" + plan.model.version +
                                "\": its memory cannot be planned");
  }
  return found->of(plan);
}

// What all layers, embedding and last norm leave for backward.
void add_kept(const StepPlan& plan, const Activations& a, MemoryPlan& memory) {
  const auto L = static_cast<double>(plan.model.n_layer);
  // What ln_out reads; what ln0 reads is block 0's input.
  memory[MemoryKind::kActivations] = a.plane;
  memory[MemoryKind::kBuffers] = a.states + (on_gpu(plan) ? kCublasBytes : 0);
  if (plan.recompute == Recompute::kBlocks) {
    memory[MemoryKind::kActivations] += L * a.plane + a.from_first_block;
    return;
  }
  const double dropped = plan.recompute == Recompute::kMixes ? a.mixes : 0;
  memory[MemoryKind::kActivations] += L * (a.block - dropped) - a.first_block_lacks + a.plane;
  memory[MemoryKind::kBuffers] += L * a.kept_by_ops;
}

// What forward of a block has freed again, where only its input is kept, lies in pieces between
// what is kept. Logits that are larger than the largest piece come on top, on the CPU as in
// LibTorch's pool of GPU memory, whose tensors do not show it. Of all three quarters are a piece,
// or not: RWKV-4 finds room for two thirds, RWKV-7 not for four tenths, which is 8 % of its bytes.
double holes(const StepPlan& plan, const Activations& a, double logits) {
  const double freed = a.block - a.plane;
  return plan.recompute == Recompute::kBlocks && logits > 0.75 * freed ? freed : 0;
}

double framework_bytes(const StepPlan& plan) {
  if (!on_gpu(plan)) {
    const bool has_low_ranks = plan.model.rank_decay > 0;
    return kCpuFrameworkBytes + (is_half(plan) && has_low_ranks ? kCpuLowRankBytes : 0);
  }
  return kPoolBytes + kCudaContextBytes + (plan.processes > 1 ? kNcclBytes : 0);
}

// model/ops/head_loss.cpp, at its last chunk.
MemoryPlan in_the_loss(const StepPlan& plan, const Activations& a, MemoryPlan memory) {
  const ModelConfig& model = plan.model;
  const auto size = static_cast<int64_t>(element_size(plan));
  const int64_t rows = plan.micro_batch_size * model.ctx_len;
  const int64_t columns =
      on_gpu(plan) ? round_up(model.vocab_size, ops::kCudaMultiple) : model.vocab_size;
  const int64_t chunk = ops::choose_rows_per_chunk(rows, columns * size);
  const double logits = static_cast<double>(std::min(chunk, rows) * columns * size);
  const auto head = static_cast<double>(columns * model.n_embd);
  memory[MemoryKind::kLogits] = logits;
  // The norm's output, and its gradient.
  double buffers = 2 * a.plane;
  if (columns != model.vocab_size) {
    buffers += head * element_size(plan);  // the head with rows of zeros
  }
  // Its gradient: of several chunks summed in fp32, on the CPU with a product beside the sum.
  buffers += head * (rows > chunk ? kFloat : element_size(plan));
  if (rows > chunk && is_half(plan) && !on_gpu(plan)) {
    buffers += head * element_size(plan);
  }
  memory[MemoryKind::kBuffers] += buffers;
  memory[MemoryKind::kFramework] += holes(plan, a, logits);
  memory.peak = MemoryPeak::kLoss;
  return memory;
}

// In the last block's ChannelMix, before a hidden row's gradient becomes that of its input, or in
// its TimeMix.
MemoryPlan in_backward(const StepPlan& plan, const Activations& a, MemoryPlan memory) {
  double in_channel_mix = a.in_channel_mix + a.hidden + a.largest_matrix;
  double in_time_mix = a.in_time_mix;
  if (plan.recompute == Recompute::kMixes) {
    // Made again; in the TimeMix ChannelMix's have come and gone.
    in_channel_mix += a.channel_mixes;
    in_time_mix += a.mixes;
  }
  double buffers = std::max(in_channel_mix, in_time_mix);
  if (plan.recompute == Recompute::kBlocks) {
    // The block's tensors but its input, and its output once more; and a gradient.
    buffers += a.block + a.kept_by_ops + a.from_first_block;
  }
  // What ln_out read is gone.
  memory[MemoryKind::kActivations] -= a.plane;
  memory[MemoryKind::kBuffers] += buffers;
  memory.peak = MemoryPeak::kBackward;
  return memory;
}

}  // namespace

std::string_view name_of(MemoryKind kind) {
  constexpr std::array<std::string_view, kNumMemoryKinds> kNames{"weights",
                                                                 "masters",
                                                                 "gradients",
                                                                 "moments",
                                                                 "activations",
                                                                 "logits",
                                                                 "buffers",
                                                                 "framework"};
  return kNames[static_cast<size_t>(kind)];
}

double MemoryPlan::total() const {
  return std::accumulate(bytes.begin(), bytes.end(), 0.0);
}

double MemoryPlan::tensor_bytes() const {
  return total() - (*this)[MemoryKind::kFramework];
}

ParameterCount count_parameters(const ModelConfig& model, const std::vector<std::string>& freeze) {
  const TensorShapes shapes = find_version_shapes(model.version).parameters(model);
  for (const std::string& pattern : freeze) {
    if (std::ranges::none_of(
            shapes, [&](const auto& tensor) { return matches_any({pattern}, tensor.first); })) {
      throw std::invalid_argument("optimizer.freeze: no tensor of the model matches \"" + pattern +
                                  "\"; they are named as in parameters.txt of a run, such as "
                                  "blocks.0.att.key.weight");
    }
  }
  ParameterCount count;
  for (const auto& [name, shape] : shapes) {
    const int64_t elements = num_elements(shape);
    count.all += elements;
    if (!matches_any(freeze, name)) {
      count.trained += elements;
      count.largest = std::max(count.largest, elements);
    }
  }
  if (count.trained == 0) {
    throw std::invalid_argument("optimizer.freeze leaves no tensor to train; freeze fewer");
  }
  return count;
}

double gradient_bytes(const StepPlan& plan) {
  return static_cast<double>(count_parameters(plan.model, plan.freeze).trained) *
         gradient_element_size(plan);
}

MemoryPlan plan_memory(const StepPlan& plan) {
  MemoryPlan memory;
  add_states(plan, memory);
  const Activations activations = activations_of(plan);
  add_kept(plan, activations, memory);
  memory[MemoryKind::kBuffers] += exchange_bytes(plan);
  memory[MemoryKind::kFramework] = framework_bytes(plan);
  const MemoryPlan loss = in_the_loss(plan, activations, memory);
  const MemoryPlan backward = in_backward(plan, activations, memory);
  return loss.total() >= backward.total() ? loss : backward;
}

}  // namespace rwkv
