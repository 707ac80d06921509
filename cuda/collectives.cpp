#include "cuda/collectives.h"

#include <cstdlib>

#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

namespace rwkv {

void make_nccl_collectives(const c10::intrusive_ptr<c10d::Store>& store,
                           int rank,
                           int world_size,
                           std::chrono::milliseconds timeout,
                           c10::DeviceIndex device,
                           c10::intrusive_ptr<c10d::Backend>& group) {
  // Multicast over NVLink is not there on every machine that says so.
  setenv("NCCL_NVLS_ENABLE", "0", /*overwrite=*/0);
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  auto nccl = c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, world_size, options);
  nccl->eagerConnectSingleDevice({c10::kCUDA, device});
  group = std::move(nccl);
}

}  // namespace rwkv
