// AdamW over one flat buffer that holds all of a model's parameters.
//
// Master weights, both moments and the gradient lie in fp32 buffers of one layout: parameters
// sorted by what the update does to them (learning-rate factor, weight decay), each starting at a
// multiple of 16 elements, so that a group is a range and the update is one pass. An fp32 parameter
// of the model is a view of the master buffer; a bf16 one is a view of a bf16 buffer of the same
// layout, which the update writes in the same pass.
//
// A parameter's gradient moves into the flat buffer as soon as backward has it: the model's
// gradients never exist twice, and a small one moves while it is in the cache. Parameters that do
// not require a gradient are frozen: they have master weights, behind all others, but neither
// moments nor gradient.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/rwkv_model.h"
#include "model/weights.h"
#include "train/run_config.h"

namespace rwkv {

class Optimizer {
 public:
  // Takes the model's present values as master weights and leaves the model in `dtype` (at::kFloat
  // or at::kBFloat16). The model must be fp32 and outlive the optimizer.
  Optimizer(RwkvModel model, const OptimizerConfig& config, at::ScalarType dtype);
  // Backward passes of the model leave their gradients in its parameters again.
  ~Optimizer();
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Starts a new sum: the next backward's gradients take the place of the accumulated ones.
  void zero_gradient();
  // To be called after each backward: adds, in fp32, gradients that were put into the parameters by
  // hand, and sets to zero those of parameters that no backward since zero_gradient() has reached.
  void accumulate_gradient();
  // Global norm of the accumulated gradient, and the name of a tensor in it that is not finite.
  double gradient_norm() const;
  std::string first_nonfinite_gradient() const;
  // Name of a tensor of the master weights, frozen ones too, that is not finite; empty if all are.
  std::string first_nonfinite_weight() const;
  // Scales the accumulated gradient to a global norm of at most clip_norm (factor
  // min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_), then updates.
  void step(double lr, double gradient_norm);

  // Updates done so far.
  int64_t steps() const { return steps_; }

  // Master weights under the parameters' names, fp32, in the model's order: views.
  NamedTensors master_weights() const;
  // Both moments as "m.<name>" and "v.<name>", of the parameters that are trained: views.
  NamedTensors moments() const;
  // Continues from saved state: fills masters and moments by name and sets the step count. Throws
  // std::runtime_error naming the file and a tensor that is missing or of another shape.
  void load(const WeightFile& weights, const WeightFile& moments, int64_t steps);

 private:
  // A parameter's place in the flat buffers.
  struct Slot {
    std::string name;
    at::Tensor parameter;
    int64_t offset;  // in elements
    bool trained;
    bool starts_anew = false;  // what the gradient buffer holds is of the step before
  };
  // A stretch of the buffers that is updated alike.
  struct Group {
    double lr_scale;
    bool weight_decay;
    int64_t begin;
    int64_t end;
  };
  at::Tensor view_of(const at::Tensor& buffer, const Slot& slot) const;
  void move_gradient(Slot& slot);
  void write_weights();

  OptimizerConfig config_;
  std::vector<Slot> slots_;  // in the model's order
  std::vector<Group> groups_;
  at::Tensor master_;
  at::Tensor m_;
  at::Tensor v_;
  at::Tensor gradient_;
  at::Tensor weights_;  // bf16, of a bf16 model; else undefined
  int64_t steps_ = 0;
};

}  // namespace rwkv
