#include "train/bench/bench_distributed.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <sched.h>

#include "train/device.h"
#include "train/optimizer.h"
#include "train/plan.h"
#include "train/step_runner.h"

namespace rwkv {
namespace {

// A GPU's first step runs op by op, the second is recorded.
constexpr int64_t kWarmUp = 1;
constexpr int64_t kGpuWarmUp = 3;
constexpr int64_t kGpuSteps = 10;

std::vector<size_t> own_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<size_t> cores;
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    for (size_t core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) {
        cores.push_back(core);
      }
    }
  }
  return cores;
}

// A model in training, alone or as one of several processes.
class Trainee {
 public:
  Trainee(const StepShape& shape,
          at::ScalarType dtype,
          const BenchSettings& settings,
          const Sharding& sharding,
          int64_t rows,
          int64_t step_rows,
          Communicator* communicator)
      : micro_batches_(settings.micro_batches),
        model_(random_model(shape.model)),
        tokens_BT_(at::randint(shape.model.vocab_size, {rows, shape.model.ctx_len}, at::kLong)) {
    const bool on_gpu = settings.runtime != nullptr;
    if (on_gpu) {
      move_to_device(model_, {.device = settings.runtime->device(), .runtime = settings.runtime});
    }
    model_->set_recompute(settings.recompute);
    optimizer_ = std::make_unique<Optimizer>(
        model_,
        OptimizerConfig{},
        dtype,
        OptimizerMemory{.split_masters = on_gpu,
                        .bf16_gradient = on_gpu && settings.micro_batches == 1},
        sharding);
    runner_ = std::make_unique<StepRunner>(model_,
                                           *optimizer_,
                                           settings.runtime,
                                           StepSettings{.micro_batches = micro_batches_,
                                                        .most_micro_batches = micro_batches_,
                                                        .step_rows = step_rows,
                                                        .l2wrap = kBenchL2Wrap},
                                           communicator);
  }

  void make_steps(int64_t count) {
    PendingNumbers before;
    for (int64_t i = 0; i < count; ++i) {
      runner_->begin_step();
      for (int64_t micro_batch = 0; micro_batch < micro_batches_; ++micro_batch) {
        runner_->add_micro_batch(tokens_BT_, tokens_BT_);
      }
      PendingNumbers numbers = runner_->finish_step(kBenchLr);
      before.wait();
      before = std::move(numbers);
    }
    before.wait();
  }

  Optimizer::Bytes bytes() const { return optimizer_->bytes(); }
  const ModelConfig& config() const { return model_->config(); }

 private:
  int64_t micro_batches_;
  RwkvModel model_;
  at::Tensor tokens_BT_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<StepRunner> runner_;
};

// What process 0 learns of each: by rank, in milliseconds of a step.
struct Timings {
  std::vector<double> alone_ms;
  std::vector<double> together_ms;              // of the slowest process
  std::vector<std::vector<double>> ms_of_rank;  // [rank][timing]
  std::vector<std::vector<double>> waiting_ms;  // [rank][timing]
};

class Contest {
 public:
  Contest(Communicator& communicator,
          const StepShape& shape,
          at::ScalarType dtype,
          const BenchSettings& settings,
          int64_t zero_stage)
      : all_(communicator),
        settings_(settings),
        steps_(on_gpu() ? kGpuSteps : 1),
        rows_(on_gpu() ? shape.batch_size * all_.world_size() : shape.batch_size) {
    const int64_t n = all_.world_size();
    if (rows_ < n) {
      throw std::invalid_argument("--batch " + std::to_string(rows_) +
                                  ": fewer sequences than the " + std::to_string(n) +
                                  " processes; give each at least one");
    }
    const int64_t rows = rows_ / n + (all_.rank() < rows_ % n ? 1 : 0);
    const Sharding sharding{.rank = all_.rank(), .num_processes = n, .zero_stage = zero_stage};
    if (all_.rank() == 0) {
      alone_ = std::make_unique<Trainee>(
          shape, dtype, settings, Sharding{}, shape.batch_size, 0, nullptr);
    }
    together_ = std::make_unique<Trainee>(
        shape, dtype, settings, sharding, rows, rows_ * settings.micro_batches, &all_);
  }

  Timings run() {
    const auto n = static_cast<size_t>(all_.world_size());
    Timings timings{.alone_ms = {}, .together_ms = {}, .ms_of_rank = {}, .waiting_ms = {}};
    timings.ms_of_rank.resize(n);
    timings.waiting_ms.resize(n);
    time(alone_.get(), on_gpu() ? kGpuWarmUp : kWarmUp);
    time(together_.get(), on_gpu() ? kGpuWarmUp : kWarmUp);
    for (int64_t i = 0; i < settings_.repeats; ++i) {
      timings.alone_ms.push_back(time(alone_.get(), steps_));
      const double waited_before = all_.waited_ms();
      const double own_ms = time(together_.get(), steps_);
      const double waited_ms = (all_.waited_ms() - waited_before) / static_cast<double>(steps_);
      const std::vector<double> ms = of_all(own_ms);
      const std::vector<double> waited = of_all(waited_ms);
      timings.together_ms.push_back(std::ranges::max(ms));
      for (size_t rank = 0; rank < n; ++rank) {
        timings.ms_of_rank[rank].push_back(ms[rank]);
        timings.waiting_ms[rank].push_back(waited[rank]);
      }
    }
    return timings;
  }

  // By rank.
  std::vector<double> of_all(double value) {
    std::vector<double> values;
    for (const int64_t millionths : all_.values_of_all(std::llround(1e6 * value), kWhat)) {
      values.push_back(static_cast<double>(millionths) / 1e6);
    }
    return values;
  }

  bool on_gpu() const { return settings_.runtime != nullptr; }
  // Of a micro-batch, of all processes.
  int64_t rows() const { return rows_; }
  const Trainee& own() const { return *together_; }

 private:
  static constexpr const char* kWhat = "the times of all";

  // Milliseconds of a step; of a process that has nothing to do, which sleeps meanwhile, 0.
  double time(Trainee* trainee, int64_t steps) {
    all_.barrier("the beginning of a timing");
    const double ms = trainee == nullptr ? 0 : milliseconds_of([&] { trainee->make_steps(steps); });
    // What the barrier waits is no part of it.
    all_.barrier("the end of a timing");
    return ms / static_cast<double>(steps);
  }

  Communicator& all_;
  BenchSettings settings_;
  int64_t steps_;
  int64_t rows_;
  std::unique_ptr<Trainee> alone_;  // of process 0
  std::unique_ptr<Trainee> together_;
};

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double states_of(const MemoryPlan& plan) {
  return plan[MemoryKind::kWeights] + plan[MemoryKind::kMasters] + plan[MemoryKind::kGradients] +
         plan[MemoryKind::kMoments];
}

}  // namespace

void require_core_each(int64_t local_size) {
  if (const auto cores = static_cast<int64_t>(own_cores().size()); cores < local_size) {
    throw std::invalid_argument("rookery bench distributed: " + std::to_string(local_size) +
                                " processes here need a core each, but may run on " +
                                std::to_string(cores) + "; give a smaller --nproc");
  }
}

void bind_to_own_core(const Placement& placement) {
  require_core_each(placement.local_size);
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(own_cores()[static_cast<size_t>(placement.local_rank)], &set);
  if (sched_setaffinity(0, sizeof set, &set) != 0) {
    throw std::runtime_error("a process cannot be bound to a core; does a sandbox forbid it?");
  }
  at::set_num_threads(1);
}

std::vector<BenchRow> bench_distributed(Communicator& communicator,
                                        const StepShape& shape,
                                        at::ScalarType dtype,
                                        const BenchSettings& settings,
                                        int64_t zero_stage) {
  const int64_t n = communicator.world_size();
  Contest contest(communicator, shape, dtype, settings, zero_stage);
  const Timings timings = contest.run();

  const int64_t row_tokens = shape.model.ctx_len * settings.micro_batches;
  const auto alone_tokens = static_cast<double>(shape.batch_size * row_tokens);
  const auto tokens = static_cast<double>(contest.rows() * row_tokens);
  const Spread alone = spread_of(timings.alone_ms);
  const Spread together = spread_of(timings.together_ms);
  const double gain = (tokens / together.median) / (alone_tokens / alone.median);
  StepShape step = shape;
  step.batch_size = contest.rows();
  const auto row = [&](int64_t processes, const StepShape& of, const Spread& ms, double count) {
    return BenchRow{.what = std::to_string(processes) + " x 1: " + step_name(of, dtype, settings),
                    .ms = ms,
                    .figures = {{"tokens_per_s", count / ms.median * 1000}},
                    .conditions = {{"processes", processes},
                                   {"zero", processes == 1 ? 0 : static_cast<double>(zero_stage)},
                                   {"threads", at::get_num_threads()}}};
  };
  std::vector<BenchRow> rows{row(n, step, together, tokens), row(1, shape, alone, alone_tokens)};
  rows[0].figures.insert(
      rows[0].figures.end(),
      {{"times_as_fast", gain}, {"percent_of_linear", 100 * gain / static_cast<double>(n)}});

  const Optimizer::Bytes bytes = contest.own().bytes();
  const std::vector<std::pair<std::string, std::vector<double>>> megabytes{
      {"weights_mb", contest.of_all(static_cast<double>(bytes.weights) / 1e6)},
      {"masters_mb", contest.of_all(static_cast<double>(bytes.masters) / 1e6)},
      {"gradients_mb", contest.of_all(static_cast<double>(bytes.gradients) / 1e6)},
      {"moments_mb", contest.of_all(static_cast<double>(bytes.moments) / 1e6)}};
  const double planned =
      states_of(plan_memory({.model = contest.own().config(),
                             .micro_batch_size = shape.batch_size,
                             .micro_batches = settings.micro_batches,
                             .dtype = train_dtype(dtype),
                             .recompute = settings.recompute,
                             .device = contest.on_gpu() ? PlanDevice::kCuda : PlanDevice::kCpu,
                             .processes = n,
                             .zero_stage = zero_stage}));
  std::vector<double> waiting_ms, waiting_percent;
  for (size_t rank = 0; rank < static_cast<size_t>(n); ++rank) {
    const Spread ms = spread_of(timings.ms_of_rank[rank]);
    BenchRow part{.what = "rank " + std::to_string(rank), .ms = ms, .figures = {}};
    double sum = 0;
    for (const auto& [name, of_rank] : megabytes) {
      part.figures.emplace_back(name, of_rank[rank]);
      sum += of_rank[rank];
    }
    part.figures.emplace_back("states_mb", sum);
    part.figures.emplace_back("formula_mb", planned / 1e6);
    if (!contest.on_gpu()) {
      waiting_ms.push_back(spread_of(timings.waiting_ms[rank]).median);
      waiting_percent.push_back(100 * waiting_ms.back() / ms.median);
      part.figures.emplace_back("waiting_ms", waiting_ms.back());
      part.figures.emplace_back("waiting_percent", waiting_percent.back());
    }
    rows[0].parts.push_back(std::move(part));
  }
  if (!contest.on_gpu()) {
    rows[0].figures.emplace_back("waiting_ms", mean_of(waiting_ms));
    rows[0].figures.emplace_back("waiting_percent", mean_of(waiting_percent));
  }
  return rows;
}

}  // namespace rwkv
