// AdamW over flat buffers that hold all of a model's parameters.
//
// Parameters that the model has in fp32 and those that it has in bf16 lie in a store each: buffers
// of master weights, both moments and the gradient in one layout, sorted by what the update does to
// the parameters (learning-rate factor, weight decay), each starting at a multiple of
// kBufferAlignment elements, so that a group is a range and the update is one pass. An fp32
// parameter of the model is a view of the master buffer; a bf16 one is a view of a bf16 buffer of
// the same layout, which the update writes in the same pass.
//
// Of several processes each has its own part of every bucket of these buffers (train/buckets.h),
// which it saves. From ZeRO stage 1 on it updates that part alone, and has no more of the moments
// and of the masters of bf16 parameters; at stage 2 no more of the gradient, either, once it is
// reduced: what backward leaves lies in a buffer of the bucket until then. What processes do
// together is in train/distributed/data_parallel.h.
//
// A parameter's gradient moves into the flat buffer as soon as backward has it: the model's
// gradients never exist twice, and a small one moves while it is in the cache. Parameters that do
// not require a gradient are frozen: they have master weights, behind all others, but neither
// moments nor gradient.
//
// Nothing of a step waits for the device: norm, clip factor and whether there is an update at all
// are decided where the buffers are (model/ops/adamw.h).
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/ops/adamw.h"
#include "model/rwkv_model.h"
#include "model/weights.h"
#include "train/buckets.h"
#include "train/checkpoint_tensors.h"
#include "train/run_config.h"

namespace rwkv {

// How a store of bf16 parameters keeps its numbers; fp32 ones have fp32 masters and gradients.
struct OptimizerMemory {
  // Masters as a bf16 weight and 16 bits more: 2 bytes a parameter less (model/ops/adamw.h).
  bool split_masters = false;
  // The gradient in bf16: enough for what a single backward pass leaves, not for a sum of several.
  bool bf16_gradient = false;
};

// What a step came to.
struct StepNumbers {
  double loss = 0;
  double gradient_norm = 0;  // before clipping
  bool skipped = false;      // loss or norm was not finite: no update was made, nor any after it
  bool outlier = false;      // loss or norm was above its limit: this update was not made
};
// Out of Optimizer::control(), on the CPU.
StepNumbers read_step_numbers(const at::Tensor& control);

// A parameter's place in the flat gradient of its store.
struct GradientPlace {
  size_t store;
  int64_t begin, end;  // elements, with what lies between it and the next
};

class Optimizer {
 public:
  // Takes the model's present values as master weights and leaves the model in `dtype` (at::kFloat
  // or at::kBFloat16), on the device where it is. The model must be fp32 and outlive the optimizer.
  Optimizer(RwkvModel model,
            const OptimizerConfig& config,
            at::ScalarType dtype,
            const OptimizerMemory& memory = {},
            const Sharding& sharding = {});
  // Backward passes of the model leave their gradients in its parameters again.
  ~Optimizer();
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Starts a new sum: the next backward's gradients take the place of the accumulated ones.
  void zero_gradient();
  // To be called after each backward: adds gradients that were put into the parameters by hand, and
  // sets to zero those of parameters that no backward since zero_gradient() has reached.
  void accumulate_gradient();
  // Where the gradients of the trained parameters are in the flat ones, in the model's order.
  std::vector<GradientPlace> gradient_places() const;
  // Is called with a number of gradient_places() whenever a backward pass has left that gradient in
  // its place.
  void set_gradient_listener(std::function<void(size_t place)> listener);

  // ---- Of several processes: what they reduce, update and gather, bucket by bucket. ----
  const Sharding& sharding() const { return sharding_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  // What backward has left of the gradient of a bucket, and of the weights that the model computes
  // with: [size()], contiguous; of the first, the own part is to become the sum over all processes.
  at::Tensor gradient_of(size_t bucket);
  at::Tensor weights_of(size_t bucket) const;
  // The own part of either.
  at::Tensor own_part(const at::Tensor& whole, size_t bucket) const;
  // At stage 2: adds the own part, which is reduced now, to the gradient, and frees the bucket's.
  void keep_reduced(size_t bucket);
  // The update in parts: of the gradient that this process updates with, its squares' sum; from
  // that of all the numbers of the step; then bucket by bucket.
  at::Tensor sum_of_squares() const;
  void begin_update(const at::Tensor& sum_of_squares, const at::Tensor& loss);
  void update_bucket(size_t bucket);
  // Bytes of the buffers: what plan.h calls weights, masters, gradients and moments.
  struct Bytes {
    int64_t weights = 0, masters = 0, gradients = 0, moments = 0;
  };
  Bytes bytes() const;

  // Global norm of the accumulated gradient of one process, and the name of a tensor in it that is
  // not finite; of several, in what this one has of it.
  double gradient_norm() const;
  std::string first_nonfinite_gradient() const;
  // Name of a tensor of the model's weights, frozen ones too, that is not finite; empty if all are.
  std::string first_nonfinite_weight() const;

  // The next updates' learning rate.
  void set_lr(double lr);
  // And what their loss and gradient norm may not exceed; infinite until it is called.
  void set_limits(double loss, double gradient_norm);
  // Scales the accumulated gradient to a global norm of at most clip_norm, then updates, unless the
  // norm or `loss` (a scalar on the device) is not finite or above its limit. Only puts work into
  // the device's queue.
  void update(const at::Tensor& loss);
  // What update() works with and leaves behind, on its device: see ops::AdamwControl.
  const at::Tensor& control() const { return control_; }
  // The same, once the device is there.
  StepNumbers numbers() const;

  // Copies into `state` the master weights of all parameters, in the model's order, and both
  // moments of those that are trained; of several processes, the own parts. Its buffers are made by
  // the first call and used again by later ones: 4 bytes for each parameter, and 8 more for each
  // that is trained. On a CPU it uses no thread but the caller's, and forward and backward may go
  // on meanwhile; update() may not.
  void copy_state(CheckpointPieces& state) const;
  // Continues from saved state: fills masters and moments by name and sets the count of updates.
  // Throws std::runtime_error naming the file and a tensor that is missing or of another shape.
  void load(const CheckpointTensors& saved, int64_t updates);

 private:
  // The flat buffers of parameters that the model has in one dtype; see AdamwBuffers.
  struct Store {
    ops::AdamwBuffers buffers;
    std::vector<ops::AdamwGroup> groups;
    at::ScalarType dtype;  // of the model's weights
    bool has_cut_masters;  // have own parts alone
  };
  // A parameter's place in its store.
  struct Slot {
    std::string name;
    at::Tensor parameter;
    size_t store;
    int64_t offset;  // in elements
    bool trained;
    size_t place = 0;          // of gradient_places()
    bool starts_anew = false;  // what the gradient buffer holds is of the step before
  };
  // Elements [begin, end) of a store's buffers; in one that is cut they begin at shard_begin.
  struct Part {
    int64_t begin, end, shard_begin;
  };
  void lay_out(size_t store,
               at::ScalarType dtype,
               std::vector<size_t> slots,
               const std::vector<ParameterTraits>& traits,
               const OptimizerMemory& memory);
  bool is_cut() const { return sharding_.zero_stage >= 1; }
  bool has_cut_gradient() const { return sharding_.zero_stage >= 2; }
  void find_gaps();
  // What this process saves of a parameter; what it has of one in a buffer that is cut, or is not.
  std::vector<Part> own_parts(const Slot& slot) const;
  std::vector<Part> held_parts(const Slot& slot, bool is_cut) const;
  static at::Tensor part_of(const at::Tensor& buffer, bool is_cut, const Part& part);
  at::Tensor master_of(const Slot& slot, const Part& part) const;
  at::Tensor view_of(const at::Tensor& buffer, const Slot& slot) const;
  void set_master(const Slot& slot, const at::Tensor& values);
  // The gradient of a parameter where backward's goes: in one piece, or in those of its buckets.
  std::vector<at::Tensor> gradient_of(const Slot& slot);
  void move_gradient(Slot& slot);

  OptimizerConfig config_;
  Sharding sharding_;
  std::vector<Slot> slots_;  // in the model's order
  std::vector<Store> stores_;
  std::vector<Bucket> buckets_;         // of trained parameters
  std::vector<Bucket> frozen_buckets_;  // of the others
  // At stage 2, by bucket: what backward leaves, until it is reduced; whether parameters leave gaps
  // in it; whether the own gradient has nothing of this step yet.
  struct Reduction {
    at::Tensor whole;
    bool has_gaps = true;
    bool starts_anew = false;
  };
  std::vector<Reduction> reductions_;
  at::Tensor control_;
  std::function<void(size_t)> listener_;
};

}  // namespace rwkv
