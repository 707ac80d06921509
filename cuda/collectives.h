// NCCL through c10d, kept apart: its headers take long to compile.
#pragma once

#include <chrono>

#include <c10/core/Device.h>
#include <c10/util/intrusive_ptr.h>

namespace c10d {
class Backend;
class Store;
}  // namespace c10d

namespace rwkv {

// Connects at once, so that what is wrong shows before the first step.
void make_nccl_collectives(const c10::intrusive_ptr<c10d::Store>& store,
                           int rank,
                           int world_size,
                           std::chrono::milliseconds timeout,
                           c10::DeviceIndex device,
                           c10::intrusive_ptr<c10d::Backend>& group);

}  // namespace rwkv
