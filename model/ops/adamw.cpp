#include "model/ops/adamw.h"

#include <limits>
#include <optional>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace rwkv::ops {
namespace {

TORCH_LIBRARY_FRAGMENT(rookery, library) {
  library.def("add_sum_of_squares(Tensor tensor, Tensor(a!) sum) -> ()");
  library.def(
      "begin_adamw(Tensor(a!) control, Tensor sum_of_squares, Tensor loss, float clip_norm) -> ()");
  library.def(
      "adamw_(Tensor(a!)? master, Tensor(b!)? weights, Tensor(c!)? low, Tensor(d!) m, Tensor(e!) "
      "v, Tensor gradient, int[] bounds, float[] lr_scales, float[] weight_decays, Tensor control, "
      "float beta1, float beta2, float eps) -> ()");
  library.def("split_master(Tensor master, Tensor(a!) weights, Tensor(b!) low) -> ()");
  library.def("join_master(Tensor weights, Tensor low) -> Tensor");
}

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void check_buffer(const char* name, const at::Tensor& tensor, at::ScalarType dtype, int64_t size) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.numel() >= size && tensor.is_contiguous() &&
                  tensor.scalar_type() == dtype,
              "adamw_: ",
              name,
              " is ",
              tensor.scalar_type(),
              " ",
              tensor.sizes(),
              ", expected contiguous ",
              dtype,
              " of ",
              size,
              " or more");
}

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

}  // namespace

at::Tensor make_adamw_control(const at::TensorOptions& options) {
  at::Tensor control = at::zeros({kControlSize}, options.dtype(at::kDouble));
  for (const AdamwControl limit : {kControlLossLimit, kControlGradientNormLimit}) {
    control.select(0, limit).fill_(std::numeric_limits<double>::infinity());
  }
  return control;
}

void add_sum_of_squares(const at::Tensor& tensor, at::Tensor& sum) {
  static const auto op =
      find_op<void(const at::Tensor&, at::Tensor&)>("rookery::add_sum_of_squares");
  TORCH_CHECK((tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16) &&
                  tensor.is_contiguous(),
              "add_sum_of_squares: expected contiguous float or bfloat16, found ",
              tensor.scalar_type());
  TORCH_CHECK(sum.scalar_type() == at::kDouble && sum.numel() == 1,
              "add_sum_of_squares: sum is ",
              sum.scalar_type(),
              " ",
              sum.sizes(),
              ", expected one double");
  op.call(tensor, sum);
}

void begin_adamw(at::Tensor& control,
                 const at::Tensor& sum_of_squares,
                 const at::Tensor& loss,
                 const AdamwSettings& settings) {
  static const auto op = find_op<void(at::Tensor&, const at::Tensor&, const at::Tensor&, double)>(
      "rookery::begin_adamw");
  op.call(control, sum_of_squares, loss.to(at::kDouble), settings.clip_norm);
}

void adamw_(AdamwBuffers& buffers,
            const std::vector<AdamwGroup>& groups,
            const at::Tensor& control,
            const AdamwSettings& settings) {
  using Update = void(const std::optional<at::Tensor>&,
                      const std::optional<at::Tensor>&,
                      const std::optional<at::Tensor>&,
                      at::Tensor&,
                      at::Tensor&,
                      const at::Tensor&,
                      at::IntArrayRef,
                      at::ArrayRef<double>,
                      at::ArrayRef<double>,
                      const at::Tensor&,
                      double,
                      double,
                      double);
  static const auto op = find_op<Update>("rookery::adamw_");
  TORCH_CHECK(groups.size() <= kMaxAdamwGroups,
              "adamw_: ",
              groups.size(),
              " groups, expected at most ",
              kMaxAdamwGroups);
  TORCH_CHECK(buffers.master.defined() != buffers.low.defined() &&
                  (buffers.weights.defined() || !buffers.low.defined()),
              "adamw_: expected either a master, or weights with their low bits");
  std::vector<int64_t> bounds;
  std::vector<double> lr_scales, weight_decays;
  int64_t size = 0;
  for (const AdamwGroup& group : groups) {
    TORCH_CHECK(group.begin >= size && group.end >= group.begin,
                "adamw_: a group is [",
                group.begin,
                ", ",
                group.end,
                "), expected to begin at ",
                size,
                " or later");
    size = group.end;
    bounds.push_back(group.begin);
    bounds.push_back(group.end);
    lr_scales.push_back(group.lr_scale);
    weight_decays.push_back(group.weight_decay);
  }
  if (buffers.master.defined()) {
    check_buffer("master", buffers.master, at::kFloat, size);
  }
  if (buffers.weights.defined()) {
    check_buffer("weights", buffers.weights, at::kBFloat16, size);
  }
  if (buffers.low.defined()) {
    check_buffer("low", buffers.low, at::kShort, size);
  }
  check_buffer("m", buffers.m, at::kFloat, size);
  check_buffer("v", buffers.v, at::kFloat, size);
  check_buffer("gradient",
               buffers.gradient,
               buffers.gradient.scalar_type() == at::kBFloat16 ? at::kBFloat16 : at::kFloat,
               size);
  op.call(optional(buffers.master),
          optional(buffers.weights),
          optional(buffers.low),
          buffers.m,
          buffers.v,
          buffers.gradient,
          bounds,
          lr_scales,
          weight_decays,
          control,
          settings.beta1,
          settings.beta2,
          settings.eps);
}

void split_master(const at::Tensor& master, at::Tensor& weights, at::Tensor& low) {
  static const auto op =
      find_op<void(const at::Tensor&, at::Tensor&, at::Tensor&)>("rookery::split_master");
  op.call(master.contiguous(), weights, low);
}

at::Tensor join_master(const at::Tensor& weights, const at::Tensor& low) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&)>("rookery::join_master");
  return op.call(weights.contiguous(), low.contiguous());
}

}  // namespace rwkv::ops
