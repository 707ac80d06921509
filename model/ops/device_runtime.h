// What a device other than the CPU offers beside its ops: memory figures, time, and whole stretches
// of work recorded once and run again. librookery_cuda.so implements it for CUDA.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

namespace c10d {
class Backend;
class Store;
}  // namespace c10d

namespace rwkv::ops {

// Work of a device that runs again with one call: the same kernels over the same memory.
class RecordedWork {
 public:
  virtual ~RecordedWork() = default;
  // Puts it into the device's queue and returns.
  virtual void replay() = 0;
};

// A copy of a tensor on its way to the CPU.
class HostCopy {
 public:
  virtual ~HostCopy() = default;
  // Waits until it is there.
  virtual at::Tensor wait() = 0;
};

struct DeviceMemory {
  int64_t total_bytes = 0;          // that the device has
  int64_t peak_tensor_bytes = 0;    // most that tensors took at once
  int64_t peak_reserved_bytes = 0;  // most that was kept for them, with what lies between
};

class DeviceRuntime {
 public:
  virtual ~DeviceRuntime() = default;

  virtual at::Device device() const = 0;
  // "NVIDIA H100 80GB HBM3, compute capability 9.0".
  virtual std::string name() const = 0;
  // Channels (n_embd) that its ops take at most.
  virtual int64_t max_channels() const = 0;
  virtual DeviceMemory memory() const = 0;
  // Gives memory that no tensor uses back, and starts the peaks anew.
  virtual void reset_memory() = 0;
  // Waits for all work so far.
  virtual void synchronize() = 0;

  // Runs `work` without letting the device do it, and keeps what it would have done. `work` may
  // neither wait for the device nor read from it; tensors that it makes live in memory that belongs
  // to all recordings together, so recordings must not run side by side, and what one leaves for
  // another must have been made outside. Throws c10::Error if something in `work` cannot be
  // recorded.
  virtual std::unique_ptr<RecordedWork> record(const std::function<void()>& work) = 0;

  // A copy of a host tensor on the device; the host tensor may be changed at once.
  virtual void upload(const at::Tensor& from_host, at::Tensor& to) = 0;
  virtual std::unique_ptr<HostCopy> download(const at::Tensor& from) = 0;

  // `group`: collective operations between such devices, one of each process; the processes meet in
  // `store`.
  virtual void make_collectives(const c10::intrusive_ptr<c10d::Store>& store,
                                int rank,
                                int world_size,
                                std::chrono::milliseconds timeout,
                                c10::intrusive_ptr<c10d::Backend>& group) = 0;

  // Milliseconds of the device from before `work` to after it; waits for its end.
  virtual double milliseconds_of(const std::function<void()>& work) = 0;
};

}  // namespace rwkv::ops
