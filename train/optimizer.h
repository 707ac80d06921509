// AdamW over flat buffers that hold all of a model's parameters.
//
// Parameters that the model has in fp32 and those that it has in bf16 lie in a store each: buffers
// of master weights, both moments and the gradient in one layout, sorted by what the update does to
// the parameters (learning-rate factor, weight decay), each starting at a multiple of 16 elements,
// so that a group is a range and the update is one pass. An fp32 parameter of the model is a view
// of the master buffer; a bf16 one is a view of a bf16 buffer of the same layout, which the update
// writes in the same pass.
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
            const OptimizerMemory& memory = {});
  // Backward passes of the model leave their gradients in its parameters again.
  ~Optimizer();
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Starts a new sum: the next backward's gradients take the place of the accumulated ones.
  void zero_gradient();
  // To be called after each backward: adds gradients that were put into the parameters by hand, and
  // sets to zero those of parameters that no backward since zero_gradient() has reached.
  void accumulate_gradient();
  // The flat gradients, one of each store, and where the trained parameters' are in them, in the
  // model's order.
  std::vector<at::Tensor> gradients() const;
  std::vector<GradientPlace> gradient_places() const;
  // Is called with a number of gradient_places() whenever a backward pass has left that gradient in
  // its place.
  void set_gradient_listener(std::function<void(size_t place)> listener);
  // Global norm of the accumulated gradient, and the name of a tensor in it that is not finite.
  double gradient_norm() const;
  std::string first_nonfinite_gradient() const;
  // Name of a tensor of the master weights, frozen ones too, that is not finite; empty if all are.
  std::string first_nonfinite_weight() const;

  // The next updates' learning rate.
  void set_lr(double lr);
  // Scales the accumulated gradient to a global norm of at most clip_norm, then updates, unless the
  // norm or `loss` (a scalar on the device) is not finite. Only puts work into the device's queue.
  void update(const at::Tensor& loss);
  // What update() works with and leaves behind, on its device: see ops::AdamwControl.
  const at::Tensor& control() const { return control_; }
  // The same, once the device is there.
  StepNumbers numbers() const;

  // Copies into `state` the master weights of all parameters, in the model's order, and both
  // moments of those that are trained. Its buffers are made by the first call and used again by
  // later ones: 4 bytes for each parameter, and 8 more for each that is trained.
  void copy_state(CheckpointPieces& state) const;
  // Continues from saved state: fills masters and moments by name and sets the step count. Throws
  // std::runtime_error naming the file and a tensor that is missing or of another shape.
  void load(const CheckpointTensors& saved, int64_t steps);

 private:
  // The flat buffers of parameters that the model has in one dtype; see AdamwBuffers.
  struct Store {
    ops::AdamwBuffers buffers;
    std::vector<ops::AdamwGroup> groups;
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
  void lay_out(size_t store,
               at::ScalarType dtype,
               std::vector<size_t> slots,
               const std::vector<ParameterTraits>& traits,
               const OptimizerMemory& memory);
  at::Tensor view_of(const at::Tensor& buffer, const Slot& slot) const;
  at::Tensor master_of(const Slot& slot) const;
  void set_master(const Slot& slot, const at::Tensor& values);
  void move_gradient(Slot& slot);
  at::Tensor sum_of_squares() const;

  OptimizerConfig config_;
  std::vector<Slot> slots_;  // in the model's order
  std::vector<Store> stores_;
  at::Tensor control_;
  std::function<void(size_t)> listener_;
};

}  // namespace rwkv
