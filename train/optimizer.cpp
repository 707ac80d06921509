#include "train/optimizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

namespace rwkv {
namespace {

int64_t padded(int64_t elements) {
  return (elements + kBufferAlignment - 1) / kBufferAlignment * kBufferAlignment;
}

// Those of `groups` that lie in [begin, end), counted from there.
std::vector<ops::AdamwGroup> groups_within(const std::vector<ops::AdamwGroup>& groups,
                                           int64_t begin,
                                           int64_t end) {
  std::vector<ops::AdamwGroup> result;
  for (ops::AdamwGroup group : groups) {
    group.begin = std::max(group.begin, begin) - begin;
    group.end = std::min(group.end, end) - begin;
    if (group.begin < group.end) {
      result.push_back(group);
    }
  }
  return result;
}

void copy_values(const at::Tensor& from, TensorPiece& to) {
  if (from.is_cpu()) {
    // copy_() would have a team of threads of its own in whichever thread calls.
    TORCH_CHECK(
        from.is_contiguous() && from.nbytes() == to.values.nbytes(), to.name, ": ", from.sizes());
    std::memcpy(to.values.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  } else {
    to.values.copy_(from.view({-1}));
  }
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
          .skipped = at[ops::kControlSkip] != 0,
          .outlier = at[ops::kControlOutlier] != 0};
}

Optimizer::Optimizer(RwkvModel model,
                     const OptimizerConfig& config,
                     at::ScalarType dtype,
                     const OptimizerMemory& memory,
                     const Sharding& sharding)
    : config_(config), sharding_(sharding) {
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
  find_gaps();
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
  // The processes' parts are equal: a buffer of own parts has as many elements on each.
  const int64_t trained_end = padded_for(trained_size, sharding_);
  for (const size_t i : slots) {
    slots_[i].offset += slots_[i].trained ? 0 : trained_end - trained_size;
  }
  size = padded_for(trained_end + size - trained_size, sharding_);
  const at::TensorOptions options = control_.options();
  const auto zeros = [&](int64_t elements, at::ScalarType type, bool is_cut) {
    return at::zeros({elements / (is_cut ? sharding_.num_processes : 1)}, options.dtype(type));
  };
  const bool is_half = dtype == at::kBFloat16;
  const at::ScalarType gradient_dtype = is_half && memory.bf16_gradient ? dtype : at::kFloat;
  const auto element_size = static_cast<int64_t>(c10::elementSize(gradient_dtype));
  const auto cut = [&](int64_t begin, int64_t end, std::vector<Bucket>& buckets) {
    const auto more = cut_into_buckets(store, begin, end, element_size, sharding_);
    buckets.insert(buckets.end(), more.begin(), more.end());
  };
  cut(0, trained_end, buckets_);
  cut(trained_end, size, frozen_buckets_);

  ops::AdamwBuffers buffers;
  const bool has_cut_masters = is_half && is_cut();
  (is_half && memory.split_masters ? buffers.low : buffers.master) =
      zeros(size, is_half && memory.split_masters ? at::kShort : at::kFloat, has_cut_masters);
  if (is_half) {
    buffers.weights = zeros(size, dtype, false);
  }
  stores_.push_back({.buffers = buffers,
                     .groups = std::move(groups),
                     .dtype = dtype,
                     .has_cut_masters = has_cut_masters});
  // The model's own tensors go one by one, before the other buffers come.
  for (const size_t i : slots) {
    set_master(slots_[i], slots_[i].parameter);
    slots_[i].parameter.set_data(view_of(is_half ? buffers.weights : buffers.master, slots_[i]));
  }
  buffers.m = zeros(trained_end, at::kFloat, is_cut());
  buffers.v = zeros(trained_end, at::kFloat, is_cut());
  buffers.gradient = zeros(trained_end, gradient_dtype, has_cut_gradient());
  stores_.back().buffers = buffers;
}

void Optimizer::find_gaps() {
  if (!has_cut_gradient()) {
    return;
  }
  reductions_.resize(buckets_.size());
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Bucket& bucket = buckets_[i];
    int64_t covered = 0;
    for (const Slot& slot : slots_) {
      if (slot.trained && slot.store == bucket.store) {
        covered += std::max<int64_t>(std::min(slot.offset + slot.parameter.numel(), bucket.end) -
                                         std::max(slot.offset, bucket.begin),
                                     0);
      }
    }
    reductions_[i].has_gaps = covered < bucket.size();
  }
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

std::vector<Optimizer::Part> Optimizer::own_parts(const Slot& slot) const {
  std::vector<Part> parts;
  for (const Bucket& bucket : slot.trained ? buckets_ : frozen_buckets_) {
    const int64_t begin = std::max(bucket.own_begin, slot.offset);
    const int64_t end = std::min(bucket.own_end, slot.offset + slot.parameter.numel());
    if (bucket.store == slot.store && begin < end) {
      parts.push_back({.begin = begin,
                       .end = end,
                       .shard_begin = bucket.shard_begin + begin - bucket.own_begin});
    }
  }
  return parts;
}

std::vector<Optimizer::Part> Optimizer::held_parts(const Slot& slot, bool is_cut) const {
  return is_cut ? own_parts(slot)
                : std::vector<Part>{{.begin = slot.offset,
                                     .end = slot.offset + slot.parameter.numel(),
                                     .shard_begin = 0}};
}

at::Tensor Optimizer::part_of(const at::Tensor& buffer, bool is_cut, const Part& part) {
  const int64_t begin = is_cut ? part.shard_begin : part.begin;
  return buffer.slice(0, begin, begin + part.end - part.begin);
}

at::Tensor Optimizer::master_of(const Slot& slot, const Part& part) const {
  const Store& store = stores_[slot.store];
  return store.buffers.master.defined()
             ? part_of(store.buffers.master, store.has_cut_masters, part)
             : ops::join_master(part_of(store.buffers.weights, false, part),
                                part_of(store.buffers.low, store.has_cut_masters, part));
}

void Optimizer::set_master(const Slot& slot, const at::Tensor& values) {
  const Store& store = stores_[slot.store];
  const ops::AdamwBuffers& buffers = store.buffers;
  if (store.dtype == at::kFloat) {
    view_of(buffers.master, slot).copy_(values);
    return;
  }
  at::Tensor weights = view_of(buffers.weights, slot);
  at::Tensor masters = values.to(weights.options().dtype(at::kFloat)).contiguous();
  if (buffers.low.defined()) {
    at::Tensor low = at::empty_like(weights, weights.options().dtype(at::kShort));
    ops::split_master(masters, weights, low);
    masters = low;
  } else {
    weights.copy_(masters);
  }
  const at::Tensor& kept = buffers.low.defined() ? buffers.low : buffers.master;
  const at::Tensor flat = masters.view({-1});
  for (const Part& part : held_parts(slot, store.has_cut_masters)) {
    part_of(kept, store.has_cut_masters, part)
        .copy_(flat.slice(0, part.begin - slot.offset, part.end - slot.offset));
  }
}

// ---- The gradient -------------------------------------------------------------------------------

void Optimizer::zero_gradient() {
  for (Slot& slot : slots_) {
    slot.starts_anew = true;
  }
  for (Reduction& reduction : reductions_) {
    reduction.starts_anew = true;
  }
}

at::Tensor Optimizer::gradient_of(size_t bucket) {
  const Bucket& at = buckets_[bucket];
  const at::Tensor& gradient = stores_[at.store].buffers.gradient;
  if (!has_cut_gradient()) {
    return gradient.slice(0, at.begin, at.end);
  }
  Reduction& reduction = reductions_[bucket];
  if (!reduction.whole.defined()) {
    reduction.whole = reduction.has_gaps ? at::zeros({at.size()}, gradient.options())
                                         : at::empty({at.size()}, gradient.options());
  }
  return reduction.whole;
}

std::vector<at::Tensor> Optimizer::gradient_of(const Slot& slot) {
  if (!has_cut_gradient()) {
    return {view_of(stores_[slot.store].buffers.gradient, slot).view({-1})};
  }
  std::vector<at::Tensor> pieces;
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const Bucket& bucket = buckets_[i];
    const int64_t begin = std::max(bucket.begin, slot.offset);
    const int64_t end = std::min(bucket.end, slot.offset + slot.parameter.numel());
    if (bucket.store == slot.store && begin < end) {
      pieces.push_back(gradient_of(i).slice(0, begin - bucket.begin, end - bucket.begin));
    }
  }
  return pieces;
}

void Optimizer::move_gradient(Slot& slot) {
  const at::NoGradGuard no_grad;
  at::Tensor& grad = slot.parameter.mutable_grad();
  const at::Tensor flat = grad.reshape({-1});
  int64_t begin = 0;
  for (at::Tensor& sum : gradient_of(slot)) {
    const at::Tensor piece = flat.slice(0, begin, begin + sum.numel());
    if (slot.starts_anew) {
      sum.copy_(piece);
    } else {
      sum.add_(piece);
    }
    begin += sum.numel();
  }
  slot.starts_anew = false;
  grad.reset();
  if (listener_) {
    listener_(slot.place);
  }
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
      for (at::Tensor& piece : gradient_of(slot)) {
        piece.zero_();
      }
      slot.starts_anew = false;
    }
    // The next pass of the step leaves its gradients in buffers of its own.
    slot.starts_anew = slot.starts_anew || has_cut_gradient();
  }
}

at::Tensor Optimizer::weights_of(size_t bucket) const {
  const Bucket& at = buckets_[bucket];
  const ops::AdamwBuffers& buffers = stores_[at.store].buffers;
  return (buffers.weights.defined() ? buffers.weights : buffers.master).slice(0, at.begin, at.end);
}

at::Tensor Optimizer::own_part(const at::Tensor& whole, size_t bucket) const {
  const Bucket& at = buckets_[bucket];
  return whole.slice(0, at.own_begin - at.begin, at.own_end - at.begin);
}

void Optimizer::keep_reduced(size_t bucket) {
  const at::NoGradGuard no_grad;
  const Bucket& at = buckets_[bucket];
  Reduction& reduction = reductions_.at(bucket);
  at::Tensor sum =
      stores_[at.store].buffers.gradient.slice(0, at.shard_begin, at.shard_begin + at.own_size());
  const at::Tensor part = own_part(reduction.whole, bucket);
  if (reduction.starts_anew) {
    sum.copy_(part);
  } else {
    sum.add_(part);
  }
  reduction.starts_anew = false;
  reduction.whole.reset();
}

at::Tensor Optimizer::sum_of_squares() const {
  at::Tensor sum = at::zeros({}, control_.options());
  if (is_cut() && !has_cut_gradient()) {
    for (const Bucket& bucket : buckets_) {
      ops::add_sum_of_squares(
          stores_[bucket.store].buffers.gradient.slice(0, bucket.own_begin, bucket.own_end), sum);
    }
    return sum;
  }
  for (const Store& store : stores_) {
    ops::add_sum_of_squares(store.buffers.gradient, sum);
  }
  return sum;
}

double Optimizer::gradient_norm() const {
  return std::sqrt(sum_of_squares().item<double>());
}

std::string Optimizer::first_nonfinite_gradient() const {
  const auto is_bad = [this](const Slot& slot) {
    const std::vector<Part> parts = held_parts(slot, has_cut_gradient());
    return std::ranges::any_of(parts, [&](const Part& part) {
      return !part_of(stores_[slot.store].buffers.gradient, has_cut_gradient(), part)
                  .isfinite()
                  .all()
                  .item<bool>();
    });
  };
  // Backward comes to the last tensor first, and hands what is bad on to all before it.
  const auto found = std::find_if(slots_.rbegin(), slots_.rend(), [&](const Slot& slot) {
    return slot.trained && is_bad(slot);
  });
  return found == slots_.rend() ? "" : found->name;
}

std::string Optimizer::first_nonfinite_weight() const {
  const auto found = std::find_if(slots_.begin(), slots_.end(), [&](const Slot& slot) {
    return !slot.parameter.isfinite().all().item<bool>();
  });
  return found == slots_.end() ? "" : found->name;
}

// ---- The update ---------------------------------------------------------------------------------

void Optimizer::set_lr(double lr) {
  control_.select(0, ops::kControlLr).fill_(lr);
}

void Optimizer::set_limits(double loss, double gradient_norm) {
  control_.select(0, ops::kControlLossLimit).fill_(loss);
  control_.select(0, ops::kControlGradientNormLimit).fill_(gradient_norm);
}

void Optimizer::update(const at::Tensor& loss) {
  begin_update(sum_of_squares(), loss);
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket) {
    update_bucket(bucket);
  }
}

void Optimizer::begin_update(const at::Tensor& sum_of_squares, const at::Tensor& loss) {
  const at::NoGradGuard no_grad;
  ops::begin_adamw(control_, sum_of_squares, loss, settings_of(config_));
}

void Optimizer::update_bucket(size_t bucket) {
  const at::NoGradGuard no_grad;
  const Bucket& at = buckets_[bucket];
  const Store& store = stores_[at.store];
  const Part part{.begin = is_cut() ? at.own_begin : at.begin,
                  .end = is_cut() ? at.own_end : at.end,
                  .shard_begin = at.shard_begin};
  const auto piece = [&](const at::Tensor& buffer, bool is_cut) {
    return buffer.defined() ? part_of(buffer, is_cut, part) : buffer;
  };
  const ops::AdamwBuffers& all = store.buffers;
  ops::AdamwBuffers buffers{.master = piece(all.master, store.has_cut_masters),
                            .weights = piece(all.weights, false),
                            .low = piece(all.low, store.has_cut_masters),
                            .m = piece(all.m, is_cut()),
                            .v = piece(all.v, is_cut()),
                            .gradient = piece(all.gradient, has_cut_gradient())};
  ops::adamw_(
      buffers, groups_within(store.groups, part.begin, part.end), control_, settings_of(config_));
}

Optimizer::Bytes Optimizer::bytes() const {
  Bytes bytes;
  const auto size = [](const at::Tensor& buffer) {
    return buffer.defined() ? static_cast<int64_t>(buffer.nbytes()) : 0;
  };
  for (const Store& store : stores_) {
    const ops::AdamwBuffers& buffers = store.buffers;
    const bool is_half = store.dtype == at::kBFloat16;
    bytes.weights += size(is_half ? buffers.weights : buffers.master);
    bytes.masters += is_half ? size(buffers.master) + size(buffers.low) : 0;
    bytes.gradients += size(buffers.gradient);
    bytes.moments += size(buffers.m) + size(buffers.v);
  }
  return bytes;
}

StepNumbers Optimizer::numbers() const {
  return read_step_numbers(control_.cpu());
}

void Optimizer::copy_state(CheckpointPieces& state) const {
  const at::NoGradGuard no_grad;
  const auto for_each_part = [this](const auto& work) {
    for (const Slot& slot : slots_) {
      for (const Part& part : own_parts(slot)) {
        work(slot, part);
      }
    }
  };
  if (state.weights.empty()) {
    for_each_part([&](const Slot& slot, const Part& part) {
      const auto make = [&](const std::string& name) {
        return TensorPiece{.name = name,
                           .shape = slot.parameter.sizes().vec(),
                           .begin = part.begin - slot.offset,
                           .end = part.end - slot.offset,
                           .values = at::empty({part.end - part.begin}, at::kFloat)};
      };
      state.weights.push_back(make(slot.name));
      if (slot.trained) {
        state.moments.push_back(make("m." + slot.name));
        state.moments.push_back(make("v." + slot.name));
      }
    });
  }
  auto weight = state.weights.begin();
  auto moment = state.moments.begin();
  for_each_part([&](const Slot& slot, const Part& part) {
    const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
    copy_values(master_of(slot, part), *weight++);
    if (slot.trained) {
      copy_values(part_of(buffers.m, is_cut(), part), *moment++);
      copy_values(part_of(buffers.v, is_cut(), part), *moment++);
    }
  });
}

void Optimizer::load(const CheckpointTensors& saved, int64_t updates) {
  const at::NoGradGuard no_grad;
  for (const Slot& slot : slots_) {
    const at::IntArrayRef shape = slot.parameter.sizes();
    set_master(slot, saved.weights.read(slot.name, shape));
    if (!slot.trained) {
      continue;
    }
    const ops::AdamwBuffers& buffers = stores_[slot.store].buffers;
    for (const Part& part : held_parts(slot, is_cut())) {
      const int64_t begin = part.begin - slot.offset, end = part.end - slot.offset;
      part_of(buffers.m, is_cut(), part)
          .copy_(saved.moments.read("m." + slot.name, shape, begin, end));
      part_of(buffers.v, is_cut(), part)
          .copy_(saved.moments.read("v." + slot.name, shape, begin, end));
    }
  }
  control_.select(0, ops::kControlSteps).fill_(static_cast<double>(updates));
}

}  // namespace rwkv
