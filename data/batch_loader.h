// Batches of token windows, read ahead by a thread of their own.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "data/binidx.h"
#include "data/sample_order.h"

namespace rwkv {

// Ids of `rows` windows, row-major [rows, ctx_len]; targets are inputs one token later.
struct Batch {
  int64_t first_sample = 0;  // sample number of row 0
  int64_t rows = 0;
  int64_t ctx_len = 0;
  std::vector<int64_t> inputs;
  std::vector<int64_t> targets;
};

// A step takes `step_samples` samples, one after another; of these this process takes `share`, from
// `first_share` on, in batches of at most `rows`: the last of a step may have fewer. Processes
// whose shares make up the step read together what one alone would.
struct BatchPlan {
  int64_t rows = 1;
  int64_t ctx_len = 1;
  int64_t first_sample = 0;  // of the first step
  int64_t step_samples = 0;  // 0: as many as `rows`, all of them this process's
  int64_t first_share = 0;
  int64_t share = 0;
  int64_t vocab_size = 0;  // ids must be below it
  int64_t prefetch_batches = 4;
};

// One consumer. `file` and `order` must outlive the loader.
class BatchLoader {
 public:
  // Throws std::invalid_argument if a number of the plan is not positive (first_sample may be 0),
  // or if plan.ctx_len is not the order's.
  BatchLoader(const BinidxFile& file, const SampleOrder& order, BatchPlan plan);
  ~BatchLoader();
  BatchLoader(const BatchLoader&) = delete;
  BatchLoader& operator=(const BatchLoader&) = delete;

  // Waits for the next batch; never ends (epochs follow one another). Throws std::runtime_error
  // naming file, token position, id and vocabulary if an id is not below plan.vocab_size. The first
  // error is thrown again by every later call.
  Batch next();
  // Seconds that calls of next() have waited so far: above zero, reading is the bottleneck.
  double wait_seconds() const;

 private:
  void read_ahead();
  Batch read_batch(int64_t first_sample, int64_t rows) const;

  const BinidxFile& file_;
  const SampleOrder& order_;
  BatchPlan plan_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Batch> ready_;
  std::exception_ptr error_;
  bool stopping_ = false;
  double wait_seconds_ = 0;
  std::thread thread_;
};

}  // namespace rwkv
