// Adds up the gradients of all processes while backward still runs.
//
// The flat gradients are cut into buckets of about 100 MB: two H200s took 79.0 ms for a step of 12
// layers of 2048 with buckets of 25 MB, and 74.2 with 200; with 24 layers 100 MB to 1 GB were alike
// (tests/bench/results/gpu_h200_x2_2026-11.md). A bucket is under way as soon as the last gradient
// in it is there; buckets leave in one order on all processes, that in which backward comes to the
// end of them. What has not left when backward is over, leaves then.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "train/distributed/communicator.h"
#include "train/optimizer.h"

namespace rwkv {

class GradientReducer {
 public:
  // Both outlive the reducer, which takes the optimizer's gradient listener.
  GradientReducer(Communicator& communicator,
                  Optimizer& optimizer,
                  int64_t bucket_bytes = int64_t{100} << 20);
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  // The next backward pass is the last of the step: its gradients are complete.
  void begin();
  // After it: returns when the gradients are the sums (on a GPU: for what is put into the queue
  // from then on).
  void finish();

 private:
  struct Bucket {
    at::Tensor gradient;
    int64_t num_places = 0;
    int64_t missing = 0;  // places that are not there yet
    std::unique_ptr<PendingCollective> under_way;
  };
  void note(size_t place);
  void send_ready();

  Communicator& communicator_;
  Optimizer& optimizer_;
  std::vector<Bucket> buckets_;  // in the order in which they leave
  std::vector<std::vector<size_t>> buckets_of_place_;
  bool counting_ = false;
  size_t next_ = 0;  // bucket to leave
};

}  // namespace rwkv
