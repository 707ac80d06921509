#include "data/batch_loader.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <utility>

namespace rwkv {
namespace {

void require_at_least(int64_t least, const char* name, int64_t value) {
  if (value < least) {
    throw std::invalid_argument(std::string("batches: ") + name + " = " + std::to_string(value) +
                                "; expected " + std::to_string(least) + " or more");
  }
}

BatchPlan checked(const BatchPlan& plan, const SampleOrder& order) {
  require_at_least(1, "rows", plan.rows);
  require_at_least(1, "ctx_len", plan.ctx_len);
  require_at_least(0, "first_sample", plan.first_sample);
  require_at_least(0, "step_samples", plan.step_samples);
  require_at_least(1, "vocab_size", plan.vocab_size);
  require_at_least(1, "prefetch_batches", plan.prefetch_batches);
  if (plan.ctx_len != order.ctx_len()) {
    throw std::invalid_argument("batches: ctx_len = " + std::to_string(plan.ctx_len) +
                                ", but the order of samples was made for " +
                                std::to_string(order.ctx_len()) + "; expected the same");
  }
  BatchPlan result = plan;
  if (plan.step_samples == 0) {
    result.step_samples = result.share = plan.rows;
  }
  require_at_least(0, "first_share", result.first_share);
  require_at_least(1, "share", result.share);
  if (result.first_share + result.share > result.step_samples) {
    throw std::invalid_argument("batches: a share of " + std::to_string(result.share) + " from " +
                                std::to_string(result.first_share) + " is beyond the " +
                                std::to_string(result.step_samples) + " samples of a step");
  }
  return result;
}

}  // namespace

BatchLoader::BatchLoader(const BinidxFile& file, const SampleOrder& order, BatchPlan plan)
    : file_(file), order_(order), plan_(checked(plan, order)), thread_([this] { read_ahead(); }) {}

BatchLoader::~BatchLoader() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void BatchLoader::read_ahead() {
  try {
    const int64_t first = plan_.first_share, end = first + plan_.share;
    int64_t step = plan_.first_sample;
    for (int64_t row = first;; row += plan_.rows) {
      if (row >= end) {
        step += plan_.step_samples;
        row = first;
      }
      Batch batch = read_batch(step + row, std::min(plan_.rows, end - row));
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] {
        return stopping_ || static_cast<int64_t>(ready_.size()) < plan_.prefetch_batches;
      });
      if (stopping_) {
        return;
      }
      ready_.push_back(std::move(batch));
      changed_.notify_all();
    }
  } catch (...) {
    const std::lock_guard lock(mutex_);
    error_ = std::current_exception();
    changed_.notify_all();
  }
}

Batch BatchLoader::read_batch(int64_t first_sample, int64_t rows) const {
  const auto ctx_len = static_cast<size_t>(plan_.ctx_len);
  Batch batch;
  batch.first_sample = first_sample;
  batch.rows = rows;
  batch.ctx_len = plan_.ctx_len;
  batch.inputs.resize(static_cast<size_t>(rows) * ctx_len);
  batch.targets.resize(batch.inputs.size());
  std::vector<int64_t> window(ctx_len + 1);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = order_.token_offset(first_sample + row);
    file_.read(begin, window);
    require_ids_below(plan_.vocab_size, file_, begin, window);
    const auto out = row * plan_.ctx_len;
    std::copy(window.begin(), window.end() - 1, batch.inputs.begin() + out);
    std::copy(window.begin() + 1, window.end(), batch.targets.begin() + out);
  }
  return batch;
}

Batch BatchLoader::next() {
  using Clock = std::chrono::steady_clock;
  std::unique_lock lock(mutex_);
  const auto has_news = [this] { return !ready_.empty() || error_ != nullptr; };
  if (!has_news()) {
    const Clock::time_point start = Clock::now();
    changed_.wait(lock, has_news);
    wait_seconds_ += std::chrono::duration<double>(Clock::now() - start).count();
  }
  if (ready_.empty()) {
    std::rethrow_exception(error_);
  }
  Batch batch = std::move(ready_.front());
  ready_.pop_front();
  changed_.notify_all();
  return batch;
}

double BatchLoader::wait_seconds() const {
  const std::lock_guard lock(mutex_);
  return wait_seconds_;
}

}  // namespace rwkv
