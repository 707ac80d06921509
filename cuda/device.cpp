#include "cuda/device.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDACachingAllocator.h>

#include "cuda/collectives.h"
#include "cuda/layer_norm_shift_mix_kernel.h"
#include "model/ops/device_runtime.h"

namespace rwkv {
namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

class CudaGraphWork final : public ops::RecordedWork {
 public:
  at::cuda::CUDAGraph graph;
  void replay() override { graph.replay(); }
};

class CudaHostCopy final : public ops::HostCopy {
 public:
  explicit CudaHostCopy(const at::Tensor& from)
      : to_(at::empty(from.sizes(), from.options().device(at::kCPU).pinned_memory(true))) {
    to_.copy_(from, /*non_blocking=*/true);
    arrived_.record();
  }
  at::Tensor wait() override {
    arrived_.synchronize();
    return to_;
  }

 private:
  at::Tensor to_;
  at::cuda::CUDAEvent arrived_;
};

class CudaRuntime final : public ops::DeviceRuntime {
 public:
  explicit CudaRuntime(c10::DeviceIndex index) : index_(index) {
    c10::cuda::set_device(index);
    // The default stream cannot be recorded.
    c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, index));
    // Split sums of a product would be rounded to bf16 between their parts.
    at::globalContext().setAllowBF16ReductionCuBLAS(false);
  }

  at::Device device() const override { return {at::kCUDA, index_}; }

  std::string name() const override {
    const cudaDeviceProp& properties = *at::cuda::getDeviceProperties(index_);
    return c10::str(
        properties.name, ", compute capability ", properties.major, ".", properties.minor);
  }

  int64_t max_channels() const override { return kMaxChannels; }

  ops::DeviceMemory memory() const override {
    const auto statistics = allocator::getDeviceStats(index_);
    constexpr auto kAll = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    return {
        .total_bytes = static_cast<int64_t>(at::cuda::getDeviceProperties(index_)->totalGlobalMem),
        .peak_tensor_bytes = statistics.allocated_bytes[kAll].peak,
        .peak_reserved_bytes = statistics.reserved_bytes[kAll].peak};
  }

  void reset_memory() override {
    synchronize();
    allocator::emptyCache();
    allocator::resetPeakStats(index_);
  }

  void synchronize() override {
    RWKV_CUDA_CHECK(cudaStreamSynchronize(current_stream()), "waiting for the GPU");
  }

  std::unique_ptr<ops::RecordedWork> record(const std::function<void()>& work) override {
    auto recorded = std::make_unique<CudaGraphWork>();
    recorded->graph.capture_begin(pool_, cudaStreamCaptureModeThreadLocal);
    try {
      work();
    } catch (...) {
      // The stream records until it is told to stop, whatever became of the recording.
      try {
        recorded->graph.capture_end();
      } catch (const c10::Error&) {
      }
      throw;
    }
    recorded->graph.capture_end();
    return recorded;
  }

  void upload(const at::Tensor& from_host, at::Tensor& to) override {
    to.copy_(from_host.pin_memory(), /*non_blocking=*/true);
  }
  std::unique_ptr<ops::HostCopy> download(const at::Tensor& from) override {
    return std::make_unique<CudaHostCopy>(from);
  }

  void make_collectives(const c10::intrusive_ptr<c10d::Store>& store,
                        int rank,
                        int world_size,
                        std::chrono::milliseconds timeout,
                        c10::intrusive_ptr<c10d::Backend>& group) override {
    make_nccl_collectives(store, rank, world_size, timeout, index_, group);
  }

  double milliseconds_of(const std::function<void()>& work) override {
    at::cuda::CUDAEvent begin(cudaEventDefault), end(cudaEventDefault);
    begin.record();
    work();
    end.record();
    end.synchronize();
    return begin.elapsed_time(end);
  }

 private:
  c10::DeviceIndex index_;
  at::cuda::MempoolId_t pool_ = at::cuda::graph_pool_handle();
};

}  // namespace

void check_cuda(cudaError_t error, const std::string& what) {
  // Read off, or the next launch would report it again.
  cudaGetLastError();
  const std::string text = what + ": " + cudaGetErrorString(error);
  TORCH_CHECK_WITH(OutOfMemoryError, error != cudaErrorMemoryAllocation, text);
  TORCH_CHECK(error == cudaSuccess, text);
}

}  // namespace rwkv

// The one function that a program looks up in this library. One device a process.
extern "C" rwkv::ops::DeviceRuntime* rookery_cuda_runtime(int index) {
  static rwkv::CudaRuntime runtime(static_cast<c10::DeviceIndex>(index));
  return &runtime;
}
