#include "train/op_checks.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string_view>
#include <unordered_map>

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// Ops that hand out memory nobody has written yet.
bool returns_unwritten_memory(std::string_view op) {
  return op.starts_with("aten::empty") || op.starts_with("aten::new_empty") ||
         op.starts_with("aten::resize") || op == "aten::set_";
}

// Ops that hand out a view of what they are given, or the tensor itself, and write nothing: what it
// holds is an earlier op's, or memory nobody has written yet.
bool returns_views(const at::RecordFunction& function) {
  const auto schema = function.operator_schema();
  return schema && !schema->returns().empty() &&
         std::all_of(schema->returns().begin(), schema->returns().end(), [](const auto& result) {
           return result.alias_info() != nullptr && !result.alias_info()->isWrite();
         });
}

bool is_finite(const at::Tensor& tensor) {
  return !tensor.defined() || !at::isFloatingType(tensor.scalar_type()) || tensor.numel() == 0 ||
         at::isfinite(tensor).all().item<bool>();
}

template <typename Values, typename Function>
void for_each_tensor(const Values& values, const Function& function) {
  for (const c10::IValue& value : values) {
    if (value.isTensor()) {
      function(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) {
        function(tensor);
      }
    }
  }
}

}  // namespace

std::string describe_values(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return "undefined";
  }
  std::string text = c10::str(tensor.sizes(), " ", c10::toString(tensor.scalar_type()));
  if (!at::isFloatingType(tensor.scalar_type()) || tensor.numel() == 0) {
    return text;
  }
  const at::Tensor finite = tensor.masked_select(at::isfinite(tensor));
  if (finite.numel() > 0) {
    text += c10::str(", ", finite.min().item<double>(), " to ", finite.max().item<double>());
  }
  const int64_t num_bad = tensor.numel() - finite.numel();
  if (num_bad > 0) {
    const int64_t num_nan = at::isnan(tensor).sum().item<int64_t>();
    text +=
        c10::str(", ", num_nan, " NaN and ", num_bad - num_nan, " infinite of ", tensor.numel());
  }
  return text;
}

namespace {

// What is known of a call when it begins, for when it ends: its inputs are gone by then.
struct Call : at::ObserverContext {
  std::string place;
  std::vector<at::Tensor> inputs;
};

// Callbacks are plain functions: the log they write to is found here.
std::atomic<void*> active_log = nullptr;

}  // namespace

// What the callbacks share. They may come from several threads.
struct OpChecks::Log {
  std::unordered_map<const void*, std::string> parameters;  // by address of the values
  std::mutex mutex;
  int64_t num_ops = 0;
  std::string last_parameter = "the start";
  // Where the forward op stood whose gradient carries this number.
  std::unordered_map<int64_t, std::string> place_of_sequence;
  std::string finding;

  // A step runs its ops one after another: the last parameter used tells the place.
  std::unique_ptr<Call> begin(const at::RecordFunction& function) {
    const std::lock_guard lock(mutex);
    auto call = std::make_unique<Call>();
    for_each_tensor(function.inputs(), [&](const at::Tensor& tensor) {
      call->inputs.push_back(tensor);
      const auto found = parameters.find(tensor.defined() ? tensor.const_data_ptr() : nullptr);
      if (found != parameters.end()) {
        last_parameter = found->second;
      }
    });
    call->place = "at or after " + last_parameter;
    if (function.scope() == at::RecordScope::BACKWARD_FUNCTION) {
      const auto found = place_of_sequence.find(function.seqNr());
      call->place = "in backward of what was done " +
                    (found == place_of_sequence.end() ? "somewhere" : found->second);
    } else if (function.seqNr() >= 0) {
      place_of_sequence.emplace(function.seqNr(), call->place);
    }
    return call;
  }

  void end(const at::RecordFunction& function, const Call& call) {
    const std::lock_guard lock(mutex);
    ++num_ops;
    if (!finding.empty() || returns_unwritten_memory(function.name()) || returns_views(function)) {
      return;
    }
    const auto outputs = function.outputs();
    bool finite = true;
    for_each_tensor(outputs,
                    [&](const at::Tensor& tensor) { finite = finite && is_finite(tensor); });
    if (finite) {
      return;
    }
    finding = std::string(function.name()) + ", " + call.place;
    for (const at::Tensor& tensor : call.inputs) {
      finding += "\n  given   " + describe_values(tensor);
    }
    for_each_tensor(outputs, [&](const at::Tensor& tensor) {
      finding += "\n  returns " + describe_values(tensor);
    });
  }
};

OpChecks::OpChecks(RwkvModel model) : log_(std::make_unique<Log>()) {
  for (const auto& item : model->named_parameters()) {
    log_->parameters.emplace(item.value().const_data_ptr(), item.key());
  }
  active_log = log_.get();
  handle_ = at::addGlobalCallback(
      at::RecordFunctionCallback(
          [](const at::RecordFunction& function) -> std::unique_ptr<at::ObserverContext> {
            const at::DisableRecordFunctionGuard not_this;
            return static_cast<Log*>(active_log.load())->begin(function);
          },
          [](const at::RecordFunction& function, at::ObserverContext* call) {
            const at::NoGradGuard no_grad;
            const at::DisableRecordFunctionGuard not_this;
            static_cast<Log*>(active_log.load())->end(function, *static_cast<Call*>(call));
          })
          .needsInputs(true)
          .needsOutputs(true)
          .scopes({at::RecordScope::FUNCTION, at::RecordScope::BACKWARD_FUNCTION}));
}

OpChecks::~OpChecks() {
  at::removeCallback(handle_);
  active_log = nullptr;
}

int64_t OpChecks::num_ops() const {
  return log_->num_ops;
}

std::string OpChecks::first_finding() const {
  return log_->finding;
}

}  // namespace rwkv
