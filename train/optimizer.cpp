#include "train/optimizer.h"

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "model/ops/adamw.h"

namespace rwkv {
namespace {

// Each parameter starts on its own cache line, as a tensor allocated alone would.
constexpr int64_t kAlignment = 16;

void fill_from(const WeightFile& file, const std::string& name, at::Tensor to) {
  const StoredTensor* stored = file.find(name);
  if (stored == nullptr) {
    throw std::runtime_error(file.path + ": " + name +
                             " is missing; the checkpoint is not of this model");
  }
  const at::Tensor tensor = to_tensor(*stored);
  if (tensor.sizes() != to.sizes()) {
    throw std::runtime_error(c10::str(file.path,
                                      ": ",
                                      name,
                                      " is ",
                                      tensor.sizes(),
                                      ", expected ",
                                      to.sizes(),
                                      "; the checkpoint is not of this model"));
  }
  to.copy_(tensor);
}

// Calls a function once backward has put a parameter's gradient in place.
class GradientHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit GradientHook(std::function<void()> call) : call_(std::move(call)) {}
  void operator()(const torch::autograd::Variable&) override { call_(); }

 private:
  std::function<void()> call_;
};

}  // namespace

Optimizer::Optimizer(RwkvModel model, const OptimizerConfig& config, at::ScalarType dtype)
    : config_(config) {
  const at::NoGradGuard no_grad;
  std::vector<ParameterTraits> traits;
  for (const auto& item : model->named_parameters()) {
    slots_.push_back({.name = item.key(),
                      .parameter = item.value(),
                      .offset = 0,
                      .trained = item.value().requires_grad()});
    traits.push_back(model->traits(item.key(), item.value().sizes()));
    if (!config.layerwise_lr) {
      traits.back().lr_scale = 1;
    }
  }
  std::vector<size_t> order(slots_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t x, size_t y) {
    return std::pair(traits[x].lr_scale, traits[x].weight_decay) <
           std::pair(traits[y].lr_scale, traits[y].weight_decay);
  });
  // Frozen parameters come last: the buffers of moments and gradient end before them.
  std::stable_partition(order.begin(), order.end(), [&](size_t i) { return slots_[i].trained; });
  int64_t size = 0;
  int64_t trained_size = 0;
  for (const size_t i : order) {
    slots_[i].offset = size;
    size += (slots_[i].parameter.numel() + kAlignment - 1) / kAlignment * kAlignment;
    if (!slots_[i].trained) {
      continue;
    }
    trained_size = size;
    if (groups_.empty() || groups_.back().lr_scale != traits[i].lr_scale ||
        groups_.back().weight_decay != traits[i].weight_decay) {
      groups_.push_back(
          {traits[i].lr_scale, traits[i].weight_decay, slots_[i].offset, slots_[i].offset});
    }
    groups_.back().end = size;
  }
  master_ = at::zeros({size}, at::kFloat);
  if (dtype == at::kBFloat16) {
    weights_ = at::zeros({size}, dtype);
  }
  // The model's own tensors go one by one, before the other buffers come.
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = slots_[i];
    view_of(master_, slot).copy_(slot.parameter);
    const bool exact = dtype == at::kFloat || traits[i].keep_fp32;
    slot.parameter.set_data(view_of(exact ? master_ : weights_, slot));
    if (slot.trained) {
      torch::autograd::impl::set_post_acc_grad_hooks(
          slot.parameter,
          std::make_unique<GradientHook>([this, place = &slot] { move_gradient(*place); }));
    }
  }
  m_ = at::zeros({trained_size}, at::kFloat);
  v_ = at::zeros_like(m_);
  gradient_ = at::zeros_like(m_);
  write_weights();
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

void Optimizer::write_weights() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    if (slot.parameter.scalar_type() != at::kFloat) {
      slot.parameter.copy_(view_of(master_, slot));
    }
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
  at::Tensor sum = view_of(gradient_, slot);
  if (slot.starts_anew) {
    sum.copy_(grad);
  } else {
    sum.add_(grad);
  }
  slot.starts_anew = false;
  grad.reset();
}

void Optimizer::accumulate_gradient() {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    if (slot.parameter.grad().defined()) {
      move_gradient(slot);
    } else if (slot.trained && slot.starts_anew) {
      view_of(gradient_, slot).zero_();
      slot.starts_anew = false;
    }
  }
}

double Optimizer::gradient_norm() const {
  return std::sqrt(ops::sum_of_squares(gradient_));
}

std::string Optimizer::first_nonfinite_gradient() const {
  // Backward comes to the last tensor first, and hands what is bad on to all before it.
  const auto found = std::find_if(slots_.rbegin(), slots_.rend(), [&](const Slot& slot) {
    return slot.trained && !view_of(gradient_, slot).isfinite().all().item<bool>();
  });
  return found == slots_.rend() ? "" : found->name;
}

std::string Optimizer::first_nonfinite_weight() const {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& slot) {
    return !view_of(master_, slot).isfinite().all().item<bool>();
  });
  return found == slots_.end() ? "" : found->name;
}

void Optimizer::step(double lr, double gradient_norm) {
  const at::NoGradGuard no_grad;
  ++steps_;
  const double clip =
      config_.clip_norm > 0 ? std::min(1.0, config_.clip_norm / (gradient_norm + 1e-6)) : 1.0;
  for (const Group& group : groups_) {
    const auto range = [&](const at::Tensor& buffer) {
      return buffer.slice(0, group.begin, group.end);
    };
    at::Tensor master = range(master_);
    at::Tensor m = range(m_);
    at::Tensor v = range(v_);
    ops::adamw_(master,
                m,
                v,
                range(gradient_),
                weights_.defined() ? range(weights_) : at::Tensor(),
                {.lr = lr * group.lr_scale,
                 .beta1 = config_.beta1,
                 .beta2 = config_.beta2,
                 .eps = config_.eps,
                 .weight_decay = group.weight_decay ? config_.weight_decay : 0.0,
                 .grad_scale = clip,
                 .step = steps_});
  }
}

NamedTensors Optimizer::master_weights() const {
  NamedTensors result;
  for (const Slot& slot : slots_) {
    result.emplace_back(slot.name, view_of(master_, slot));
  }
  return result;
}

NamedTensors Optimizer::moments() const {
  NamedTensors result;
  for (const Slot& slot : slots_) {
    if (slot.trained) {
      result.emplace_back("m." + slot.name, view_of(m_, slot));
      result.emplace_back("v." + slot.name, view_of(v_, slot));
    }
  }
  return result;
}

void Optimizer::load(const WeightFile& weights, const WeightFile& moments, int64_t steps) {
  const at::NoGradGuard no_grad;
  for (const Slot& slot : slots_) {
    fill_from(weights, slot.name, view_of(master_, slot));
    if (slot.trained) {
      fill_from(moments, "m." + slot.name, view_of(m_, slot));
      fill_from(moments, "v." + slot.name, view_of(v_, slot));
    }
  }
  steps_ = steps;
  write_weights();
}

}  // namespace rwkv
