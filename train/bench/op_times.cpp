#include "train/bench/op_times.h"

#include <atomic>
#include <chrono>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/record_function.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace rwkv {
namespace {

// Points in time: the host's, or those at which a device comes to what is asked of it here.
class Clock {
 public:
  explicit Clock(at::Device device) : device_(device) {}

  size_t stamp() {
    if (device_.is_cpu()) {
      host_.push_back(std::chrono::steady_clock::now());
      return host_.size() - 1;
    }
    const c10::impl::VirtualGuardImpl guard(device_.type());
    // Unlike the default flag, this one keeps the time.
    events_.emplace_back(device_.type(), c10::EventFlag::BACKEND_DEFAULT)
        .record(guard.getStream(device_));
    return events_.size() - 1;
  }

  // Of a device, once wait() has returned.
  double ms_between(size_t begin, size_t end) const {
    return device_.is_cpu()
               ? std::chrono::duration<double, std::milli>(host_[end] - host_[begin]).count()
               : events_[begin].elapsedTime(events_[end]);
  }

  void wait() const {
    if (!device_.is_cpu()) {
      events_.back().synchronize();
    }
  }

 private:
  at::Device device_;
  std::vector<std::chrono::steady_clock::time_point> host_;
  std::deque<c10::Event> events_;
};

// Which op a name of the dispatcher or of a node of the graph belongs to.
std::optional<StepOp> op_of_name(std::string_view name) {
  struct Prefix {
    std::string_view prefix;
    StepOp op;
  };
  // Ops of head_loss's have their own row: what is left of it is products.
  constexpr Prefix kPrefixes[] = {
      {"rookery::embedding", StepOp::kEmbedding},
      {"aten::layer_norm", StepOp::kLayerNorm},
      {"aten::native_layer_norm", StepOp::kLayerNorm},
      {"rookery::layer_norm_shift_mix", StepOp::kLayerNormShiftMix},
      {"rookery::wkv4", StepOp::kWkv4},
      {"aten::tanh", StepOp::kLowRankProducts},
      {"aten::sigmoid", StepOp::kLowRankProducts},
      {"rookery::wkv7_inputs", StepOp::kWkv7Inputs},
      {"rookery::wkv7_output", StepOp::kWkv7Output},
      {"rookery::wkv7", StepOp::kWkv7},
      {"rookery::relu_squared", StepOp::kReluSquared},
      {"rookery::gated_residual", StepOp::kGatedResidual},
      {"rookery::head_loss", StepOp::kHeadProducts},
      {"rookery::cross_entropy", StepOp::kCrossEntropy},
      {"torch::autograd::AccumulateGrad", StepOp::kGradientSum},
      {"rookery::add_sum_of_squares", StepOp::kGlobalNorm},
      {"rookery::begin_adamw", StepOp::kGlobalNorm},
      {"rookery::adamw_", StepOp::kAdamw},
  };
  for (const auto& [prefix, op] : kPrefixes) {
    if (name.starts_with(prefix)) {
      return op;
    }
  }
  return std::nullopt;
}

// By the matrix that an op multiplies with. Low-rank factors are no modules, with a "weight".
std::optional<StepOp> op_of_matrix(std::string_view parameter) {
  if (parameter.ends_with(".att.output.weight")) {
    return StepOp::kOutputProduct;
  }
  if (parameter.find(".att.") != std::string_view::npos) {
    return parameter.ends_with(".weight") ? StepOp::kRkvProducts : StepOp::kLowRankProducts;
  }
  return parameter.find(".ffn.") != std::string_view::npos ? std::optional(StepOp::kFfnProducts)
                                                           : std::nullopt;
}

// A call under way; of its thread.
struct Call : at::ObserverContext {
  Call* caller = nullptr;
  size_t index = 0;
};
thread_local Call* innermost_call = nullptr;

// What the callbacks write to. They may come from several threads: a device's backward has its own.
class OpLog {
 public:
  OpLog(RwkvModel model, at::Device device) : clock_(device) {
    for (const auto& item : model->named_parameters()) {
      if (item.value().dim() == 2) {
        if (const auto op = op_of_matrix(item.key())) {
          matrices_.emplace(item.value().const_data_ptr(), *op);
        }
      }
    }
  }

  std::unique_ptr<Call> begin(const at::RecordFunction& function) {
    const std::lock_guard lock(mutex_);
    auto call = std::make_unique<Call>();
    call->caller = std::exchange(innermost_call, call.get());
    call->index = intervals_.size();
    intervals_.push_back(
        {.op = op_of(function, call->caller),
         .caller = call->caller == nullptr ? std::nullopt : std::optional(call->caller->index),
         .begin = clock_.stamp()});
    // Backward runs without making a graph; until then the number is the next node's.
    if (function.scope() == at::RecordScope::FUNCTION && function.seqNr() >= 0) {
      op_of_sequence_[function.seqNr()] = intervals_.back().op;
    }
    return call;
  }

  void end(const Call& call) {
    const std::lock_guard lock(mutex_);
    innermost_call = call.caller;
    intervals_[call.index].end = clock_.stamp();
  }

  size_t stamp() { return clock_.stamp(); }

  // Each op's time without that of the ops it called.
  StepOpTimes sum(size_t begin, size_t end) const {
    clock_.wait();
    StepOpTimes times{.total_ms = clock_.ms_between(begin, end)};
    for (const Interval& interval : intervals_) {
      const double ms = clock_.ms_between(interval.begin, interval.end);
      times.ms[static_cast<size_t>(interval.op)] += ms;
      if (interval.caller) {
        times.ms[static_cast<size_t>(intervals_[*interval.caller].op)] -= ms;
      }
    }
    return times;
  }

 private:
  struct Interval {
    StepOp op;
    std::optional<size_t> caller;
    size_t begin;
    size_t end = 0;
  };

  StepOp op_of(const at::RecordFunction& function, const Call* caller) const {
    if (const auto op = op_of_name(function.name())) {
      return *op;
    }
    if (function.scope() == at::RecordScope::BACKWARD_FUNCTION) {
      const auto found = op_of_sequence_.find(function.seqNr());
      if (found != op_of_sequence_.end()) {
        return found->second;
      }
    }
    for (const c10::IValue& value : function.inputs()) {
      if (value.isTensor() && value.toTensor().defined()) {
        const auto found = matrices_.find(value.toTensor().const_data_ptr());
        if (found != matrices_.end()) {
          return found->second;
        }
      }
    }
    if (caller != nullptr) {
      return intervals_[caller->index].op;
    }
    // Of what nothing else calls: a residual, and autograd's sums of gradients.
    const std::string_view name = function.name();
    return name == "aten::add" || name == "aten::add_" ? StepOp::kSums : StepOp::kOther;
  }

  std::mutex mutex_;
  Clock clock_;
  std::unordered_map<const void*, StepOp> matrices_;  // by address of the values
  // What made the node of the graph that carries this number: of the calls that saw the number
  // coming, the last and innermost.
  std::unordered_map<int64_t, StepOp> op_of_sequence_;
  std::vector<Interval> intervals_;
};

// Callbacks are plain functions: the log they write to is found here.
std::atomic<OpLog*> active_log = nullptr;

// Calls reach the log while this lives.
class Recording {
 public:
  explicit Recording(OpLog& log) {
    active_log = &log;
    handle_ = at::addGlobalCallback(
        at::RecordFunctionCallback(
            [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
              return active_log.load()->begin(function);
            },
            [](const at::RecordFunction&, at::ObserverContext* call) {
              active_log.load()->end(*static_cast<Call*>(call));
            })
            .needsInputs(true)
            .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
  }
  ~Recording() {
    at::removeCallback(handle_);
    active_log = nullptr;
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

 private:
  at::CallbackHandle handle_;
};

}  // namespace

StepOpTimes time_ops_of_step(RwkvModel model,
                             at::Device device,
                             const std::function<void()>& step) {
  OpLog log(std::move(model), device);
  size_t begin = 0;
  size_t end = 0;
  {
    const Recording recording(log);
    begin = log.stamp();
    step();
    end = log.stamp();
  }
  return log.sum(begin, end);
}

}  // namespace rwkv
