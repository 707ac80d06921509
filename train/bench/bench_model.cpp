#include "train/bench/bench_model.h"

#include <algorithm>
#include <functional>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include "model/weights.h"
#include "train/bench/op_times.h"
#include "train/bench/trace.h"
#include "train/device.h"
#include "train/machine.h"
#include "train/machine_rates.h"
#include "train/optimizer.h"
#include "train/plan.h"
#include "train/step_runner.h"

namespace rwkv {
namespace {

constexpr uint64_t kSeed = 1;
constexpr double kEmbRange = 1e-4;

double element_size(at::ScalarType dtype) {
  return static_cast<double>(c10::elementSize(dtype));
}

// Elements of the weights that multiply: every matrix but the embedding, which is looked up.
double matrix_elements(RwkvModel model) {
  double count = 0;
  for (const auto& item : model->named_parameters()) {
    if (item.value().dim() == 2 && item.key() != "emb.weight") {
      count += static_cast<double>(item.value().numel());
    }
  }
  return count;
}

// Bytes of all weights that one token's pass reads: one row of the embedding is nothing.
double bytes_read_by_a_token(RwkvModel model) {
  double bytes = 0;
  for (const auto& item : model->named_parameters()) {
    if (item.key() != "emb.weight") {
      bytes += static_cast<double>(item.value().nbytes());
    }
  }
  return bytes;
}

// Master weight, gradient and both moments in fp32, and the bf16 copy of the weights: read and
// written once by an update, gradient and weights being one way.
double optimizer_bytes(double parameters, at::ScalarType dtype) {
  return parameters * (7 * sizeof(float) + (dtype == at::kBFloat16 ? element_size(dtype) : 0));
}

MemoryPlan plan_of(RwkvModel model,
                   const StepShape& shape,
                   at::ScalarType dtype,
                   const BenchSettings& settings) {
  return plan_memory(
      {.model = model->config(),
       .micro_batch_size = shape.batch_size,
       .micro_batches = settings.micro_batches,
       .dtype = train_dtype(dtype),
       .recompute = settings.recompute,
       .device = settings.runtime == nullptr ? PlanDevice::kCpu : PlanDevice::kCuda});
}

// The model of a step beside the times that `step` spends in its ops.
std::vector<BenchRow> explain_step(RwkvModel model,
                                   const StepShape& shape,
                                   at::ScalarType dtype,
                                   const StepRates& rates,
                                   int64_t repeats,
                                   const std::function<void()>& step) {
  const at::Device device = model->parameters().front().device();
  // As the head is padded there (model/ops/head_loss.h).
  const int64_t vocab_multiple = device.is_cuda() ? 64 : 1;
  const std::vector<StepOpCost> costs =
      step_model({.model = model->config(), .batch_size = shape.batch_size},
                 train_dtype(dtype),
                 vocab_multiple);
  std::vector<double> total_ms;
  std::vector<std::vector<double>> op_ms(kNumStepOps);
  for (int64_t i = 0; i < repeats; ++i) {
    const StepOpTimes times = time_ops_of_step(model, device, step);
    total_ms.push_back(times.total_ms);
    for (size_t op = 0; op < kNumStepOps; ++op) {
      op_ms[op].push_back(times.ms[op]);
    }
  }
  const Spread total = spread_of(total_ms);
  const auto row = [&](std::string_view what, const Spread& ms, double explained_ms) {
    return BenchRow{.what = std::string(what),
                    .ms = ms,
                    .figures = {{"percent", 100 * explained_ms / total.median}}};
  };
  const auto add_cost = [](BenchRow& to, const StepOpCost& cost, double floor) {
    to.figures.insert(to.figures.end(),
                      {{"calls", cost.calls},
                       {"gflop", cost.flops / 1e9},
                       {"mb", cost.bytes / 1e6},
                       {"floor_ms", floor},
                       {"x_floor", to.ms.median / floor}});
  };

  std::vector<BenchRow> rows;
  StepOpCost sum{.op = StepOp::kOther, .calls = 0, .flops = 0, .bytes = 0};
  double sum_of_floors = 0;
  double explained_ms = 0;
  for (const StepOpCost& cost : costs) {
    const Spread ms = spread_of(op_ms[static_cast<size_t>(cost.op)]);
    const double floor = floor_ms(cost, rates);
    rows.push_back(row(name_of(cost.op), ms, ms.median));
    add_cost(rows.back(), cost, floor);
    sum.calls += cost.calls;
    sum.flops += cost.flops;
    sum.bytes += cost.bytes;
    sum_of_floors += floor;
    explained_ms += ms.median;
  }
  const Spread other = spread_of(op_ms[static_cast<size_t>(StepOp::kOther)]);
  rows.push_back(row(name_of(StepOp::kOther), other, other.median));
  rows.push_back(row("explained", total, explained_ms));
  add_cost(rows.back(), sum, sum_of_floors);
  return rows;
}

// The time of a step's matrix products, then of the optimizer's bytes.
double step_floor_s(RwkvModel model, double tokens, at::ScalarType dtype, const StepRates& rates) {
  return 6 * tokens * matrix_elements(model) / rates.flops_per_s +
         optimizer_bytes(static_cast<double>(model->num_parameters()), dtype) / rates.bytes_per_s;
}

constexpr int64_t kTracedSteps = 3;
void trace_steps(const BenchSettings& settings,
                 at::Device device,
                 const std::function<void()>& steps) {
  if (!settings.trace.empty()) {
    write_trace(settings.trace, device, steps);
  }
}

// As the trainer makes it on a device: recorded, its numbers read a step late.
BenchRow bench_step_on(ops::DeviceRuntime& runtime,
                       const StepShape& shape,
                       at::ScalarType dtype,
                       const BenchSettings& settings,
                       StepDetail detail) {
  const StepRates rates{.flops_per_s = matmul_flops_per_s(dtype, &runtime),
                        .bytes_per_s = update_bytes_per_s(&runtime)};
  runtime.reset_memory();
  RwkvModel model = random_model(shape.model);
  move_to_device(model, {.device = runtime.device(), .runtime = &runtime});
  model->set_recompute(settings.recompute);
  Optimizer optimizer(
      model, {}, dtype, {.split_masters = true, .bf16_gradient = settings.micro_batches == 1});
  const at::Tensor tokens_BT =
      at::randint(shape.model.vocab_size, {shape.batch_size, shape.model.ctx_len}, at::kLong);
  StepRunner runner(model,
                    optimizer,
                    &runtime,
                    {.micro_batches = settings.micro_batches, .l2wrap = kBenchL2Wrap});
  PendingNumbers before;
  const auto step = [&] {
    runner.begin_step();
    for (int64_t i = 0; i < settings.micro_batches; ++i) {
      runner.add_micro_batch(tokens_BT, tokens_BT);
    }
    PendingNumbers numbers = runner.finish_step(kBenchLr);
    before.wait();
    before = std::move(numbers);
  };
  // Op by op, then recorded, then a replay.
  constexpr int64_t kWarmUp = 3;
  const Spread ms = time_repeated(kWarmUp, settings.repeats, step);
  before.wait();
  const auto tokens = static_cast<double>(tokens_BT.numel() * settings.micro_batches);
  const ops::DeviceMemory memory = runtime.memory();
  BenchRow row{
      .what = step_name(shape, dtype, settings),
      .ms = ms,
      .figures = {{"tokens_per_s", tokens / ms.median * 1000},
                  {"floor_ms", step_floor_s(model, tokens, dtype, rates) * 1000},
                  {"peak_mb", static_cast<double>(memory.peak_tensor_bytes) / 1e6},
                  {"reserved_mb", static_cast<double>(memory.peak_reserved_bytes) / 1e6},
                  {"formula_mb", plan_of(model, shape, dtype, settings).tensor_bytes() / 1e6}},
      .conditions = {{"matmul_gflops_per_s", rates.flops_per_s / 1e9},
                     {"update_gb_per_s", rates.bytes_per_s / 1e9}}};
  trace_steps(settings, runtime.device(), [&] {
    for (int64_t i = 0; i < kTracedSteps; ++i) {
      step();
    }
    before.wait();
  });
  if (detail == StepDetail::kByOp) {
    // A replay shows no ops: the same step, one op after another.
    StepRunner by_op(model, optimizer, &runtime, {.l2wrap = kBenchL2Wrap, .record = false});
    row.parts = explain_step(model, shape, dtype, rates, settings.repeats, [&] {
      by_op.begin_step();
      by_op.add_micro_batch(tokens_BT, tokens_BT);
      by_op.finish_step(kBenchLr).wait();
    });
  }
  return row;
}

}  // namespace

TrainDtype train_dtype(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? TrainDtype::kBf16 : TrainDtype::kFp32;
}

// Matrices are not the author's: of those many are zero, which could make a product quicker than it
// will be, and orthogonal ones take minutes where they are large.
RwkvModel random_model(const ModelConfig& config, at::ScalarType dtype) {
  RwkvModel model = empty_model(config, dtype);
  const at::NoGradGuard no_grad;
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(kSeed);
  for (auto& item : model->named_parameters()) {
    at::Tensor& parameter = item.value();
    if (parameter.dim() == 2) {
      parameter.uniform_(-0.05, 0.05, generator);
    } else {
      model->version().initialise(model->config(), item.key(), parameter, kEmbRange, generator);
    }
  }
  return model;
}

std::string step_name(const StepShape& shape, at::ScalarType dtype, const BenchSettings& settings) {
  std::string name = "step " + describe(shape.model, dtype) + " B" +
                     std::to_string(shape.batch_size) + " T" + std::to_string(shape.model.ctx_len);
  if (settings.micro_batches > 1) {
    name += " x " + std::to_string(settings.micro_batches);
  }
  if (settings.recompute != Recompute::kNone) {
    name += ", " + std::string(name_of(settings.recompute)) + " recomputed";
  }
  return name;
}

std::string describe(const ModelConfig& config, at::ScalarType dtype) {
  return config.version + " L" + std::to_string(config.n_layer) + " D" +
         std::to_string(config.n_embd) + " V" + std::to_string(config.vocab_size) +
         (dtype == at::kBFloat16 ? " bf16" : " fp32");
}

BenchRow bench_step(const StepShape& shape,
                    at::ScalarType dtype,
                    const BenchSettings& settings,
                    StepDetail detail) {
  if (settings.runtime != nullptr) {
    return bench_step_on(*settings.runtime, shape, dtype, settings, detail);
  }
  const int64_t held_before = anonymous_bytes();
  RwkvModel model = random_model(shape.model);
  model->set_recompute(settings.recompute);
  Optimizer optimizer(model, {}, dtype);
  const at::Tensor tokens_BT =
      at::randint(shape.model.vocab_size, {shape.batch_size, shape.model.ctx_len}, at::kLong);

  std::vector<double> forward_ms, backward_ms, rest_ms;
  const auto step = [&] {
    optimizer.zero_gradient();
    at::Tensor loss;
    optimizer.set_lr(kBenchLr);
    forward_ms.push_back(0);
    backward_ms.push_back(0);
    for (int64_t i = 0; i < settings.micro_batches; ++i) {
      forward_ms.back() += milliseconds_of([&] {
        loss =
            model->loss(tokens_BT, tokens_BT, model->initial_state(shape.batch_size), kBenchL2Wrap)
                .loss;
      });
      backward_ms.back() += milliseconds_of([&] {
        loss.backward();
        optimizer.accumulate_gradient();
      });
    }
    rest_ms.push_back(milliseconds_of([&] { optimizer.update(loss); }));
  };
  constexpr int64_t kWarmUp = 2;
  const Spread ms = time_repeated(kWarmUp, settings.repeats, step);
  const auto median_of_timed = [](const std::vector<double>& times) {
    return spread_of({times.begin() + kWarmUp, times.end()}).median;
  };

  const auto peak_bytes = static_cast<double>(peak_anonymous_bytes() - held_before);
  // After the peak was read: they allocate, too.
  const StepRates rates{.flops_per_s = matmul_flops_per_s(dtype),
                        .bytes_per_s = update_bytes_per_s()};
  const auto tokens = static_cast<double>(tokens_BT.numel() * settings.micro_batches);
  BenchRow row{.what = step_name(shape, dtype, settings),
               .ms = ms,
               .figures = {{"tokens_per_s", tokens / ms.median * 1000},
                           {"floor_ms", step_floor_s(model, tokens, dtype, rates) * 1000},
                           {"forward_ms", median_of_timed(forward_ms)},
                           {"backward_ms", median_of_timed(backward_ms)},
                           {"rest_ms", median_of_timed(rest_ms)},
                           {"peak_mb", peak_bytes / 1e6},
                           {"formula_mb", plan_of(model, shape, dtype, settings).total() / 1e6}},
               .conditions = {{"threads", at::get_num_threads()},
                              {"matmul_gflops_per_s", rates.flops_per_s / 1e9},
                              {"update_gb_per_s", rates.bytes_per_s / 1e9}}};
  trace_steps(settings, at::kCPU, [&] {
    for (int64_t i = 0; i < kTracedSteps; ++i) {
      step();
    }
  });
  if (detail == StepDetail::kByOp) {
    row.parts = explain_step(model, shape, dtype, rates, settings.repeats, step);
  }
  return row;
}

std::vector<BenchRow> bench_decode(const ModelConfig& config,
                                   int64_t prompt_len,
                                   at::ScalarType dtype,
                                   const BenchSettings& settings) {
  const c10::InferenceMode inference;
  ops::DeviceRuntime* const runtime = settings.runtime;
  const int64_t held_before = anonymous_bytes();
  RwkvModel model = random_model(config, dtype);
  if (runtime != nullptr) {
    model->to(runtime->device());
    // Only now: LibTorch has no figures of a GPU before something lies there.
    runtime->reset_memory();
  }
  // Weights that fit into a cache stay there from token to token, so that the rate is that of as
  // many bytes.
  const double weight_bytes = bytes_read_by_a_token(model);
  double read_rate = 0;
  double matmul_rate = 0;
  const auto peak_bytes = [&] {
    return runtime != nullptr ? runtime->memory().peak_tensor_bytes
                              : peak_anonymous_bytes() - held_before;
  };
  const at::Tensor prompt_1T =
      at::randint(config.vocab_size, {1, prompt_len}, at::kLong).to(model->device());

  State state = model->initial_state(1);
  // A token is chosen from its logits before the next begins.
  const auto run = [&](const at::Tensor& tokens_1T, const State& before) {
    state = model->forward_last(tokens_1T, before).state;
    if (runtime != nullptr) {
      runtime->synchronize();
    }
  };
  // First what needs less memory: the peak is that of all before.
  const Spread token_ms =
      time_repeated(16, settings.repeats, [&] { run(prompt_1T.slice(1, 0, 1), state); });
  const int64_t token_peak_bytes = peak_bytes();
  const Spread prefill_ms = time_repeated(1, std::max<int64_t>(settings.repeats / 8, 3), [&] {
    run(prompt_1T, model->initial_state(1));
  });
  const int64_t prefill_peak_bytes = peak_bytes();
  // After the peaks were read, for they allocate, too. Twice, and the best counts: another
  // program's burst could make a floor too high.
  for (int i = 0; i < 2; ++i) {
    read_rate = std::max(read_rate, read_bytes_per_s(static_cast<int64_t>(weight_bytes), runtime));
    matmul_rate = std::max(matmul_rate, matmul_flops_per_s(dtype, runtime));
  }

  // The head runs for the prompt's last token alone.
  const auto head_elements = static_cast<double>(config.vocab_size * config.n_embd);
  const double prefill_flops =
      2 *
      (static_cast<double>(prompt_len) * (matrix_elements(model) - head_elements) + head_elements);
  double all_bytes = 0;
  for (const at::Tensor& parameter : model->parameters()) {
    all_bytes += static_cast<double>(parameter.nbytes());
  }
  const auto row =
      [&](const std::string& what, const Spread& ms, double tokens, double floor_s, int64_t peak) {
        return BenchRow{.what = what + " " + describe(config, dtype),
                        .ms = ms,
                        .figures = {{"tokens_per_s", tokens / ms.median * 1000},
                                    {"floor_ms", floor_s * 1000},
                                    {"peak_mb", static_cast<double>(peak) / 1e6},
                                    {"weights_mb", all_bytes / 1e6}},
                        .conditions = {{"threads", at::get_num_threads()},
                                       {"matmul_gflops_per_s", matmul_rate / 1e9},
                                       {"read_gb_per_s", read_rate / 1e9}}};
      };
  return {row("prefill of " + std::to_string(prompt_len),
              prefill_ms,
              static_cast<double>(prompt_len),
              std::max(prefill_flops / matmul_rate, weight_bytes / read_rate),
              prefill_peak_bytes),
          row("decode a token", token_ms, 1, weight_bytes / read_rate, token_peak_bytes)};
}

}  // namespace rwkv
