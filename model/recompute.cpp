#include "model/recompute.h"

#include <memory>
#include <optional>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function_hook.h>

namespace rwkv {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// Runs before the function that it is hooked to; hands the gradients through.
class BeforeBackward final : public torch::autograd::FunctionPreHook {
 public:
  explicit BeforeBackward(std::function<void()> call) : call_(std::move(call)) {}
  tensor_list operator()(const tensor_list& grads) override {
    call_();
    return grads;
  }

 private:
  std::function<void()> call_;
};

// Tensors whose storages are empty from now until they are filled.
class Dropped {
 public:
  Dropped(const std::vector<at::Tensor>& tensors,
          std::function<std::vector<at::Tensor>()> make_again)
      : make_again_(std::move(make_again)) {
    for (const at::Tensor& tensor : tensors) {
      c10::Storage storage = tensor.storage();
      storage.unsafeGetStorageImpl()->set_data_ptr_noswap(at::DataPtr(nullptr, tensor.device()));
      storages_.push_back(std::move(storage));
    }
  }

  void fill() {
    if (storages_.empty()) {
      return;
    }
    const at::NoGradGuard no_grad;
    const std::vector<at::Tensor> tensors = make_again_();
    for (size_t i = 0; i < storages_.size(); ++i) {
      c10::StorageImpl* const from = tensors[i].storage().unsafeGetStorageImpl();
      storages_[i].unsafeGetStorageImpl()->set_data_ptr_noswap(
          from->set_data_ptr(at::DataPtr(nullptr, tensors[i].device())));
    }
    storages_.clear();
    // It holds what it makes them from.
    make_again_ = nullptr;
  }

 private:
  std::vector<c10::Storage> storages_;
  std::function<std::vector<at::Tensor>()> make_again_;
};

// The same values at the start of a graph of their own.
tensor_list detached(const tensor_list& tensors) {
  tensor_list result;
  for (const at::Tensor& tensor : tensors) {
    result.push_back(tensor.defined() ? tensor.detach().set_requires_grad(tensor.requires_grad())
                                      : tensor);
  }
  return result;
}

struct SegmentFunction : torch::autograd::Function<SegmentFunction> {
  // `trigger` needs a gradient, so that backward comes here even if no input does.
  static tensor_list forward(AutogradContext* context,
                             const at::Tensor& /*trigger*/,
                             const std::shared_ptr<Segment>& segment,
                             const at::Tensor& first,
                             const at::Tensor& second,
                             const at::Tensor& third,
                             const at::Tensor& fourth,
                             const std::optional<at::Tensor>& fifth) {
    const tensor_list inputs{first, second, third, fourth, fifth.value_or(at::Tensor())};
    context->save_for_backward(inputs);
    context->set_materialize_grads(false);
    // The context keeps values, not closures.
    context->saved_data["segment"] =
        c10::IValue::make_capsule(c10::make_intrusive<SegmentHolder>(segment));
    // As in backward, where gradients are on: a matrix product of a few rows may go another way
    // without them. What would be kept for backward goes with the results.
    const at::AutoGradMode enable(true);
    tensor_list outputs = (*segment)(detached(inputs));
    for (at::Tensor& output : outputs) {
      output = output.detach();
    }
    return outputs;
  }

  static tensor_list backward(AutogradContext* context, const tensor_list& grads) {
    const auto holder = context->saved_data["segment"].toCapsule();
    const Segment& segment = *static_cast<SegmentHolder&>(*holder).segment;
    const tensor_list inputs = detached(context->get_saved_variables());
    tensor_list outputs, output_grads;
    {
      const at::AutoGradMode enable(true);
      const tensor_list all = segment(inputs);
      for (size_t i = 0; i < grads.size(); ++i) {
        if (grads[i].defined() && all[i].requires_grad()) {
          outputs.push_back(all[i]);
          output_grads.push_back(grads[i]);
        }
      }
    }
    // A whole backward of its own, not one towards the inputs: parameters, too, get their
    // gradients.
    torch::autograd::backward(outputs, output_grads);
    tensor_list result(2);
    for (const at::Tensor& input : inputs) {
      result.push_back(input.defined() ? input.grad() : input);
    }
    return result;
  }

  struct SegmentHolder : torch::CustomClassHolder {
    explicit SegmentHolder(std::shared_ptr<Segment> held) : segment(std::move(held)) {}
    std::shared_ptr<Segment> segment;
  };
};

}  // namespace

void drop_until_backward(const std::vector<at::Tensor>& dropped,
                         const std::vector<at::Tensor>& outputs,
                         std::function<std::vector<at::Tensor>()> make_again) {
  std::vector<std::shared_ptr<torch::autograd::Node>> functions;
  for (const at::Tensor& output : outputs) {
    if (output.grad_fn() != nullptr) {
      functions.push_back(output.grad_fn());
    }
  }
  if (functions.empty()) {
    return;
  }
  const auto state = std::make_shared<Dropped>(dropped, std::move(make_again));
  for (const auto& function : functions) {
    function->add_pre_hook(std::make_unique<BeforeBackward>([state] { state->fill(); }));
  }
}

std::vector<at::Tensor> run_twice(Segment function, const std::array<at::Tensor, 5>& inputs) {
  if (!at::GradMode::is_enabled()) {
    return function({inputs.begin(), inputs.end()});
  }
  const at::Tensor trigger = at::empty({0}).set_requires_grad(true);
  return SegmentFunction::apply(trigger,
                                std::make_shared<Segment>(std::move(function)),
                                inputs[0],
                                inputs[1],
                                inputs[2],
                                inputs[3],
                                inputs[4].defined() ? std::optional(inputs[4]) : std::nullopt);
}

}  // namespace rwkv
