// The processes that train together: what they compute in common, and who of them is there.
//
// Every process calls the same operations in the same order. They run on c10d: NCCL between GPUs,
// Gloo between CPUs and for small things. Results are the same bits on every process, and the same
// again on as many processes.
//
// A process that ends, stops or is cut off does not leave the others waiting. Processes tell each
// other twice a second that they are there. An operation that fails throws a DistributedError that
// says what was going on and, as far as it can be known, which process is missing; where a process
// is silent for longer than the timeout, the others say so and end with exit code 1, whatever they
// are waiting in.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "train/device.h"
#include "train/distributed/placement.h"

namespace rwkv {

class DistributedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An operation that may still go on.
class PendingCollective {
 public:
  virtual ~PendingCollective() = default;
  // On the CPU returns when the result is there; on a GPU at once, and work that is put into the
  // queue from then on finds it. Throws DistributedError.
  virtual void wait() = 0;
};

class Communicator {
 public:
  // Waits for all processes. `placement` is of more than one. Throws DistributedError naming the
  // address and the processes that did not come within `timeout`.
  Communicator(const Placement& placement,
               const OpenDevice& device,
               std::chrono::milliseconds timeout);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int64_t rank() const;
  int64_t world_size() const;
  // How long this process has waited so far for operations that had begun (not: the device, which
  // waits by itself).
  double waited_ms() const;
  // What errors say was going on: "step 12".
  void set_activity(const std::string& activity);

  // `what` names the operation in errors: "the sum of gradients". Tensors are contiguous, of the
  // same size on every process, on the communicator's device or on the CPU; the caller keeps them
  // until the operation has ended.
  // The sum over all processes takes the tensor's place.
  std::unique_ptr<PendingCollective> begin_sum(const at::Tensor& tensor, const char* what);
  void sum(const at::Tensor& tensor, const char* what);
  // `whole` is world_size() parts of equal size, one after another. Of the sum over all processes
  // each gets the part that has its rank as number; `part` may be that part of `whole`, of which
  // the others are then undefined.
  std::unique_ptr<PendingCollective> begin_reduce_scatter(const at::Tensor& whole,
                                                          const at::Tensor& part,
                                                          const char* what);
  // The parts of all processes, in the order of their ranks; `part` may lie in `whole`.
  std::unique_ptr<PendingCollective> begin_all_gather(const at::Tensor& part,
                                                      const at::Tensor& whole,
                                                      const char* what);
  // That of process `from` takes the tensor's place.
  void broadcast(const at::Tensor& tensor, int64_t from, const char* what);
  // From one process to one other, which calls receive() for a tensor of the same size.
  void send(const at::Tensor& tensor, int64_t to, const char* what);
  void receive(const at::Tensor& tensor, int64_t from, const char* what);
  // The bits that any process has set.
  int64_t any_bits(int64_t bits, const char* what);
  // Every process's value, by rank.
  std::vector<int64_t> values_of_all(int64_t value, const char* what);
  // The text of process 0.
  std::string text_of_first(const std::string& text, const char* what);
  void barrier(const char* what);

  // Beside the operations, from any thread: a note that all processes can read under its name, and
  // one that somebody has left or will leave. read_note() waits for it; it throws DistributedError
  // once a process is lost, or has said that it fails. `what` names in errors what is waited for.
  void leave_note(const std::string& name, const std::string& text);
  std::string read_note(const std::string& name, const char* what);
  // Takes a note away that nobody will read any more.
  void remove_note(const std::string& name);

  // Leaves a last word for the others: why this process is about to end.
  void announce_failure(const std::string& reason);

 private:
  template <typename Begin>
  std::unique_ptr<PendingCollective> begin(std::vector<at::Tensor> tensors,
                                           const char* what,
                                           const Begin& begin);

  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace rwkv
