#include "train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace rwkv {
namespace {

// Each parameter starts on its own cache line, as a tensor allocated alone would.
constexpr int64_t kAlignment = 16;

int64_t padded(int64_t elements) {
  return (elements + kAlignment - 1) / kAlignment * kAlignment;
}

// Room for a whole tensor of a checkpoint.
TensorPiece make_piece(const std::string& name, const at::Tensor& parameter) {
  return {.name = name,
          .shape = parameter.sizes().vec(),
          .begin = 0,
          .end = parameter.numel(),
          .values = at::empty({parameter.numel()}, at::kFloat)};
}

// Calls a function once backward has put a parameter's gradient in place.
class GradientHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit GradientHook(std::function<void()> call) : call_(std::move(call)) {}
  void operator()(const torch::autograd::Variable&) override { call_(); }

 private:
  std::function<void()> call_;
};

ops::AdamwSettings settings_of(const OptimizerConfig& config) {
  return {.beta1 = config.beta1,
          .beta2 = config.beta2,
          .eps = config.eps,
          .clip_norm = config.clip_norm};
}

}  // namespace

StepNumbers read_step_numbers(const at::Tensor& control) {
  const auto* at = control.const_data_ptr<double>();
  return {.loss = at[ops::kControlLoss],
          .gradient_norm = at[ops::kControlGradientNorm],
          .skipped = at[ops::kControlSkip] != 0};
}

Optimizer::Optimizer(RwkvModel model,
                     const OptimizerConfig& config,
                     at::ScalarType dtype,
                     const OptimizerMemory& memory)
    : config_(config) {
  const at::NoGradGuard no_grad;
  std::vector<ParameterTraits> traits;
  std::vector<size_t> exact, rounded;
  for (const auto& item : model->named_parameters()) {
    traits.push_back(model->traits(item.key(), item.value().sizes()));
    if (!config.layerwise_lr) {
      traits.back().lr_scale = 1;
    }
    const bool is_exact = dtype == at::kFloat || traits.back().keep_fp32;
    (is_exact ? exact : rounded).push_back(slots_.size());
    slots_.push_back({.name = item.key(),
                      .parameter = item.value(),
                      .store = 0,
                      .offset = 0,
                      .trained = item.value().requires_grad()});
  }
  control_ = ops::make_adamw_control(slots_.front().parameter.options().requires_grad(false));
  lay_out(0, at::kFloat, std::move(exact), traits, memory);
  if (!rounded.empty()) {
    lay_out(1, dtype, std::move(rounded), traits, memory);
  }
  size_t place = 0;
  for (Slot& slot : slots_) {
    if (slot.trained) {
      slot.place = place++;
      torch::autograd::impl::set_post_acc_grad_hooks(
          slot.parameter,
          std::make_unique<GradientHook>([this, place = &slot] { move_gradient(*place); }));
    }
  }
}

void Optimizer::lay_out(size_t store,
                        at::ScalarType dtype,
                        std::vector<size_t> slots,
                        const std::vector<ParameterTraits>& traits,
                        const OptimizerMemory& memory) {
  std::stable_sort(slots.begin(), slots.end(), [&](size_t x, size_t y) {
    return std::pair(traits[x].lr_scale, traits[x].weight_decay) <
           std::pair(traits[y].lr_scale, traits[y].weight_decay);
  });
  // Frozen parameters come last: the buffers of moments and gradient end before them.
  std::stable_partition(slots.begin(), slots.end(), [&](size_t i) { return slots_[i].trained; });
  std::vector<ops::AdamwGroup> groups;
  int64_t size = 0;
  int64_t trained_size = 0;
  for (const size_t i : slots) {
    slots_[i].store = store;
    slots_[i].offset = size;
    const ops::AdamwGroup group{
        .begin = size,
        .end = size + padded(slots_[i].parameter.numel()),
        .lr_scale = traits[i].lr_scale,
        .weight_decay = traits[i].weight_decay ? config_.weight_decay : 0.0};
    size = group.end;
    if (!slots_[i].trained) {
      continue;
    }
    trained_size = size;
    if (!groups.empty() && groups.back().lr_scale == group.lr_scale &&
        groups.back().weight_decay == group.weight_decay) {
      groups.back().end = size;
    } else {
      groups.push_back(group);
    }
  }
  const at::TensorOptions options = control_.options();
  const auto zeros = [&](int64_t elements, at::ScalarType type) {
    return at::zeros({elements}, options.dtype(type));
  };
  const bool is_half = dtype == at::kBFloat16;
  ops::AdamwBuffers buffers;
  (is_half && memory.split_masters ? buffers.low : buffers.master) =
      zeros(size, is_half && memory.split_masters ? at::kShort : at::kFloat);
  if (is_half) {
    buffers.weights = zeros(size, dtype);
  }
  stores_.push_back({.buffers = buffers, .groups = std::move(groups)});
  // The model's own tensors go one by one, before the other buffers come.
  for (const size_t i : slots) {
    set_master(slots_[i], slots_[i].parameter);
    slots_[i].parameter.set_data(view_of(is_half ? buffers.weights : buffers.master, slots_[i]));
  }
  buffers.m = zeros(trained_size, at::kFloat);
  buffers.v = zeros(trained_size, at::kFloat);
  buffers.gradient = zeros(trained_size, is_half && memory.bf16_gradient ? dtype : at::kFloat);
  stores_.back().buffers = buffers;
}

Optimizer::~Optimizer() {
  for (const Slot& slot : slots_) {
    if (slot.trained) {
      torch::autograd::impl::set_post_acc_grad_hooks(slot.parameter, nullptr);
    }
  }
}

at::Tensor Optimizer::view_of(const at::Tensor& buffer, const Slot& slot) const {
  return buffer.slice(0, slot.offset, slot.offset + slot.parameter.numel())
      .view(slot.parameter.sizes());
}

at::Tensor Optimizer::master_of(const Slot& slot) const {
  const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
  return buffers.master.defined()
             ? view_of(buffers.master, slot)
             : ops::join_master(view_of(buffers.weights, slot), view_of(buffers.low, slot));
}

void Optimizer::set_master(const Slot& slot, const at::Tensor& values) {
  const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
  if (!buffers.master.defined()) {
    at::Tensor weights = view_of(buffers.weights, slot);
    at::Tensor low = view_of(buffers.low, slot);
    ops::split_master(values.to(low.options().dtype(at::kFloat)), weights, low);
    return;
  }
  view_of(buffers.master, slot).copy_(values);
  if (buffers.weights.defined()) {
    view_of(buffers.weights, slot).copy_(values);
  }
}

void Optimizer::zero_gradient() {
  for (Slot& slot : slots_) {
    slot.starts_anew = true;
  }
}

void Optimizer::move_gradient(Slot& slot) {
  const at::NoGradGuard no_grad;
  at::Tensor& grad = slot.parameter.mutable_grad();
  at::Tensor sum = view_of(stores_[slot.store].buffers.gradient, slot);
  if (slot.starts_anew) {
    sum.copy_(grad);
  } else {
    sum.add_(grad);
  }
  slot.starts_anew = false;
  grad.reset();
  if (listener_) {
    listener_(slot.place);
  }
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> result;
  for (const Store& store : stores_) {
    result.push_back(store.buffers.gradient);
  }
  return result;
}

std::vector<GradientPlace> Optimizer::gradient_places() const {
  std::vector<GradientPlace> result;
  for (const Slot& slot : slots_) {
    if (slot.trained) {
      result.push_back({.store = slot.store,
                        .begin = slot.offset,
                        .end = slot.offset + padded(slot.parameter.numel())});
    }
  }
  return result;
}

void Optimizer::set_gradient_listener(std::function<void(size_t)> listener) {
  listener_ = std::move(listener);
}

void Optimizer::accumulate_gradient() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    if (slot.parameter.grad().defined()) {
      move_gradient(slot);
    } else if (slot.trained && slot.starts_anew) {
      view_of(stores_[slot.store].buffers.gradient, slot).zero_();
      slot.starts_anew = false;
    }
  }
}

at::Tensor Optimizer::sum_of_squares() const {
  at::Tensor sum = at::zeros({}, control_.options());
  for (const Store& store : stores_) {
    ops::add_sum_of_squares(store.buffers.gradient, sum);
  }
  return sum;
}

double Optimizer::gradient_norm() const {
  return std::sqrt(sum_of_squares().item<double>());
}

std::string Optimizer::first_nonfinite_gradient() const {
  // Backward comes to the last tensor first, and hands what is bad on to all before it.
  const auto found = std::find_if(slots_.rbegin(), slots_.rend(), [&](const Slot& slot) {
    return slot.trained &&
           !view_of(stores_[slot.store].buffers.gradient, slot).isfinite().all().item<bool>();
  });
  return found == slots_.rend() ? "" : found->name;
}

std::string Optimizer::first_nonfinite_weight() const {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& slot) {
    return !master_of(slot).isfinite().all().item<bool>();
  });
  return found == slots_.end() ? "" : found->name;
}

void Optimizer::set_lr(double lr) {
  control_.select(0, ops::kControlLr).fill_(lr);
}

void Optimizer::update(const at::Tensor& loss) {
  const at::NoGradGuard no_grad;
  const ops::AdamwSettings settings = settings_of(config_);
  ops::begin_adamw(control_, sum_of_squares(), loss, settings);
  for (Store& store : stores_) {
    ops::adamw_(store.buffers, store.groups, control_, settings);
  }
}

StepNumbers Optimizer::numbers() const {
  return read_step_numbers(control_.cpu());
}

void Optimizer::copy_state(CheckpointPieces& state) const {
  const at::NoGradGuard no_grad;
  if (state.weights.empty()) {
    for (const Slot& slot : slots_) {
      state.weights.push_back(make_piece(slot.name, slot.parameter));
      if (slot.trained) {
        state.moments.push_back(make_piece("m." + slot.name, slot.parameter));
        state.moments.push_back(make_piece("v." + slot.name, slot.parameter));
      }
    }
  }
  auto weight = state.weights.begin();
  auto moment = state.moments.begin();
  for (const Slot& slot : slots_) {
    const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
    (weight++)->values.copy_(master_of(slot).view({-1}));
    if (slot.trained) {
      (moment++)->values.copy_(view_of(buffers.m, slot).view({-1}));
      (moment++)->values.copy_(view_of(buffers.v, slot).view({-1}));
    }
  }
}

void Optimizer::load(const CheckpointTensors& saved, int64_t steps) {
  const at::NoGradGuard no_grad;
  for (const Slot& slot : slots_) {
    const at::IntArrayRef shape = slot.parameter.sizes();
    set_master(slot, saved.weights.read(slot.name, shape));
    if (slot.trained) {
      const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
      view_of(buffers.m, slot).copy_(saved.moments.read("m." + slot.name, shape));
      view_of(buffers.v, slot).copy_(saved.moments.read("v." + slot.name, shape));
    }
  }
  control_.select(0, ops::kControlSteps).fill_(static_cast<double>(steps));
}

}  // namespace rwkv
