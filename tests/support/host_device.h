// Runs CUDA kernels on the CPU, so that every push tests their arithmetic, edges and barriers.
//
// Included before an unchanged .cu file that g++ compiles (-include). Each thread of a block, and
// of all blocks of a cluster, is a fiber that runs until it waits for others (a barrier, a shuffle,
// a bulk copy) or ends. Blocks, or clusters, run one after another. What it asks of a .cu file:
//   - launches go through cudaLaunchKernelEx;
//   - shared memory is dynamic and reached through shared_memory() of cuda/intrinsics.cuh;
//   - an instruction that C++ has no word for stands in cuda/intrinsics.cuh, with its twin here.
// What makes mistakes show: shared memory is poisoned with NaN before every block and lies in its
// own allocation, for AddressSanitizer to watch; the order in which waiting fibers go on can be
// shuffled (set_lane_order), so that a missing barrier changes results; a thread's asynchronous
// copy is carried out only when the thread waits for it, a bulk copy only once nothing else can
// run, so that reading before it has arrived gives NaN; a wait that never ends is named and aborts.
//
// Source: the CUDA C++ Programming Guide, 13.0: thread hierarchy, warp functions, clusters,
// asynchronous barriers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define RWKV_HOST_DEVICE 1

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

namespace rwkv::host_device {

// ---- For tests ----------------------------------------------------------------------------------

// The order in which fibers take turns: 0 is that of their numbers, any other a shuffled one.
void set_lane_order(uint64_t seed);

// ---- What a kernel sees -------------------------------------------------------------------------

struct ThreadPlace {
  uint3 thread;
  uint3 block;
  dim3 block_size;
  dim3 grid_size;
};
const ThreadPlace& here();

// All threads of the block that have not ended.
void block_barrier();
// Whether the predicate holds for any thread of the block; a barrier, too.
bool block_any(bool predicate);
// The lanes of `mask`, all of which must come.
void warp_barrier(uint32_t mask);
// Hands every lane of the warp the value, of up to 8 bytes, that lane `from` has given.
uint64_t warp_exchange(uint32_t mask, uint64_t value, uint32_t from);
uint32_t warp_ballot(uint32_t mask, bool predicate);

void* shared_memory();
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_barrier();
void* peer_shared(void* own, uint32_t rank);

// Copies of a thread, carried out when it waits for their group: at most `pending` newer groups
// stay under way.
void async_copy(void* shared, const void* global, uint32_t bytes);
void async_copy_commit();
void async_copy_wait(int pending);

// An mbarrier: `expected` arrivals and all announced bytes end a phase.
void mbarrier_init(uint64_t* barrier, uint32_t expected);
void mbarrier_arrive(uint64_t* barrier);
void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

template <typename Value>
Value shuffle(uint32_t mask, Value value, uint32_t from) {
  static_assert(sizeof(Value) <= sizeof(uint64_t) && std::is_trivially_copyable_v<Value>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_exchange(mask, bits, from);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t lane() {
  const ThreadPlace& place = here();
  return (place.thread.x +
          place.block_size.x * (place.thread.y + place.block_size.y * place.thread.z)) %
         32;
}

// ---- Launching ----------------------------------------------------------------------------------

// Runs the body once for each thread of the grid.
void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& body);

template <typename... Parameters, typename... Arguments>
cudaError_t launch(const cudaLaunchConfig_t* config,
                   void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  const std::tuple<std::decay_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  run_grid(*config, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

}  // namespace rwkv::host_device

// Not macros: a launch configuration has members called gridDim and blockDim.
namespace rwkv::host_device {
template <auto kPlace, auto kAxis>
struct Number {
  operator uint32_t() const { return (here().*kPlace).*kAxis; }
};
template <auto kPlace, typename Three>
struct Numbers {
  Number<kPlace, &Three::x> x;
  Number<kPlace, &Three::y> y;
  Number<kPlace, &Three::z> z;
};
}  // namespace rwkv::host_device
inline constexpr rwkv::host_device::Numbers<&rwkv::host_device::ThreadPlace::thread, uint3>
    threadIdx;
inline constexpr rwkv::host_device::Numbers<&rwkv::host_device::ThreadPlace::block, uint3> blockIdx;
inline constexpr rwkv::host_device::Numbers<&rwkv::host_device::ThreadPlace::block_size, dim3>
    blockDim;
inline constexpr rwkv::host_device::Numbers<&rwkv::host_device::ThreadPlace::grid_size, dim3>
    gridDim;
#define cudaLaunchKernelEx ::rwkv::host_device::launch
#define cudaFuncSetAttribute(kernel, attribute, value) (cudaSuccess)

inline void __syncthreads() {
  rwkv::host_device::block_barrier();
}
inline int __syncthreads_or(int predicate) {
  return rwkv::host_device::block_any(predicate != 0);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  rwkv::host_device::warp_barrier(mask);
}
template <typename Value>
Value __shfl_sync(uint32_t mask, Value value, int from) {
  return rwkv::host_device::shuffle(mask, value, static_cast<uint32_t>(from) % 32);
}
template <typename Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int bits) {
  return rwkv::host_device::shuffle(
      mask, value, rwkv::host_device::lane() ^ static_cast<uint32_t>(bits));
}
// Beyond the warp's end a lane keeps its own value.
template <typename Value>
Value __shfl_down_sync(uint32_t mask, Value value, unsigned distance) {
  const uint32_t from = rwkv::host_device::lane() + distance;
  return rwkv::host_device::shuffle(mask, value, from < 32 ? from : rwkv::host_device::lane());
}
template <typename Value>
Value __shfl_up_sync(uint32_t mask, Value value, unsigned distance) {
  const uint32_t lane = rwkv::host_device::lane();
  return rwkv::host_device::shuffle(mask, value, lane >= distance ? lane - distance : lane);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  return rwkv::host_device::warp_ballot(mask, predicate != 0);
}
inline int __any_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(uint32_t mask, int predicate) {
  return __ballot_sync(mask, predicate) == mask;
}
// Built into nvcc.
using std::max;
using std::min;
template <typename Value>
Value __ldg(const Value* from) {
  return *from;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  return __uint_as_float(static_cast<uint32_t>(bits));
}
inline int __float_as_int(float value) {
  return static_cast<int>(__float_as_uint(value));
}
