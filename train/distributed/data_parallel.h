// What several processes do together in a step: they add up their gradients while backward still
// runs, update, and gather the weights if each has updated a part.
//
// The flat buffers are cut into buckets of about 100 MB of gradient: two H200s took 79.0 ms for a
// step of 12 layers of 2048 with buckets of 25 MB, and 74.2 with 200; with 24 layers 100 MB to 1 GB
// were alike (tests/bench/results/gpu_h200_x2_2026-11.md). A bucket is under way as soon as the
// last gradient in it is there; buckets leave in one order on all processes, that in which backward
// comes to the end of them. What has not left when backward is over, leaves then.
//
// ZeRO stage 0 sums each bucket on every process. From stage 1 on the sum is scattered, each
// process updates its part, and a bucket's weights are gathered while the next one is updated: as
// many bytes as a sum. The gradient of several micro-batches is reduced once, after the last; at
// stage 2, where no process keeps the whole of it, after each.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "train/distributed/communicator.h"
#include "train/optimizer.h"

namespace rwkv {

class DataParallel {
 public:
  // Both outlive this, which takes the optimizer's gradient listener. The optimizer's sharding is
  // the communicator's.
  DataParallel(Communicator& communicator, Optimizer& optimizer);
  ~DataParallel();
  DataParallel(const DataParallel&) = delete;
  DataParallel& operator=(const DataParallel&) = delete;

  // Before a backward pass, and after it and accumulate_gradient(): where the gradient is complete
  // then, `is_last`, or not kept, it is reduced (on a GPU: for what is put into the queue from then
  // on).
  void begin_pass(bool is_last);
  void finish_pass();
  // Takes part in the passes of others: this process's step has fewer.
  void add_empty_pass(bool is_last);
  // The update, after the last pass; `loss` is this process's share of the step's, a scalar.
  void update(const at::Tensor& loss);

 private:
  struct Reduction {
    int64_t num_places = 0;
    int64_t missing = 0;  // places that are not there yet
    std::unique_ptr<PendingCollective> under_way = nullptr;
  };
  void note(size_t place);
  void send_ready();
  void settle(size_t bucket);

  Communicator& communicator_;
  Optimizer& optimizer_;
  const int64_t zero_stage_;
  const bool is_bounded_;              // how many reductions are under way
  std::vector<Reduction> reductions_;  // by the optimizer's buckets
  std::vector<size_t> order_;          // in which they leave
  std::vector<std::vector<size_t>> buckets_of_place_;
  bool counting_ = false;
  size_t next_ = 0;     // of order_, to leave
  size_t settled_ = 0;  // of order_, those before it are reduced
};

}  // namespace rwkv
