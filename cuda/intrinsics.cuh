// The instructions of a GPU that C++ has no word for, under names of our own, and the shared memory
// of a block. Each has a plain twin in tests/support/host_device.h, under which g++ compiles our
// kernels to run them on the CPU.
//
// Source: PTX ISA 9.0: ex2, rcp, cp.async, cp.async.bulk, mbarrier, barrier.cluster, mapa.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// The architecture that this pass of nvcc compiles for, as 800 for sm_80; 0 in the host's.
#ifdef __CUDA_ARCH__
constexpr int kArchitecture = __CUDA_ARCH__;
#else
constexpr int kArchitecture = 0;
#endif

// The compiler moves no memory access over this place: reads that it would hoist from unrolled code
// cost registers.
__device__ __forceinline__ void keep_reads_behind() {
  asm volatile("" ::: "memory");
}

#ifdef RWKV_HOST_DEVICE

__device__ __forceinline__ void* shared_memory() {
  return host_device::shared_memory();
}
__device__ __forceinline__ float fast_exp2(float x) {
  return std::exp2(x);
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  return 1.0f / x;
}
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  return 1.0f / std::sqrt(x);
}
__device__ __forceinline__ void async_copy16(void* shared, const void* global) {
  host_device::async_copy(shared, global, 16);
}
__device__ __forceinline__ void async_copy_commit() {
  host_device::async_copy_commit();
}
template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  host_device::async_copy_wait(kPending);
}
__device__ __forceinline__ uint32_t cluster_rank() {
  return host_device::cluster_rank();
}
__device__ __forceinline__ uint32_t cluster_size() {
  return host_device::cluster_size();
}
__device__ __forceinline__ void cluster_barrier() {
  host_device::cluster_barrier();
}
template <typename T>
__device__ __forceinline__ T load_peer_shared(const T* own, uint32_t rank) {
  return *static_cast<const T*>(host_device::peer_shared(const_cast<T*>(own), rank));
}
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t expected) {
  host_device::mbarrier_init(barrier, expected);
}
__device__ __forceinline__ void mbarrier_fence_init() {}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  host_device::mbarrier_arrive(barrier);
}
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  host_device::mbarrier_arrive_expect(barrier, bytes);
}
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  host_device::mbarrier_wait(barrier, parity);
}
__device__ __forceinline__ void bulk_copy_to_shared(void* shared,
                                                    const void* global,
                                                    uint32_t bytes,
                                                    uint64_t* barrier) {
  host_device::bulk_copy(shared, global, bytes, barrier);
}
__device__ __forceinline__ void fence_before_bulk_copy() {}

#else

// All of a block's shared memory; 128-byte aligned.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(128) unsigned char rwkv_shared_memory[];
  return rwkv_shared_memory;
}

// 2^x to 2 units in the last place; denormal results are zero.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x to 1 unit in the last place; for |x| above 2^126 it is zero.
__device__ __forceinline__ float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_sqrt(float x) {
  return 1.0f / sqrtf(x);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 aligned bytes into shared memory while this thread goes on.
__device__ __forceinline__ void async_copy16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void async_copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the newest `kPending` groups of this thread are under way. Other threads see
// what has arrived after a barrier.
template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Thread-block clusters and bulk copies (sm_90 and up) ---------------------------------------

// Place of this block in its cluster, and the cluster's number of blocks.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}
// All threads of all blocks of the cluster; what they wrote to shared memory is seen after it.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
// What another block of the cluster has where `own` points to in the shared memory of this one.
template <typename T>
__device__ __forceinline__ T load_peer_shared(const T* own, uint32_t rank) {
  static_assert(sizeof(T) == 4, "one 32-bit load");
  uint32_t bits = 0;
#if __CUDA_ARCH__ >= 900
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
#endif
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// One thread makes the barrier for `expected` arrivals a phase; then mbarrier_fence_init() and a
// barrier of the block before anyone uses it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t expected) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(expected)
               : "memory");
#endif
}
// Makes initialised barriers known to the copy engine.
__device__ __forceinline__ void mbarrier_fence_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}
// Arrives, and has the phase wait for that many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}
// Waits for the end of the phase of that parity: 0 for the first, 1 for the second, 0 for ...
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
#endif
}
// Copies 16-byte aligned bytes, a multiple of 16, into shared memory; they count on the barrier
// when they have arrived.
__device__ __forceinline__ void bulk_copy_to_shared(void* shared,
                                                    const void* global,
                                                    uint32_t bytes,
                                                    uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global),
      "r"(bytes),
      "r"(shared_address(barrier))
      : "memory");
#endif
}
// Between ordinary accesses to shared memory and a bulk copy that overwrites it: by every thread
// that made them, before the barrier after which the copy is issued.
__device__ __forceinline__ void fence_before_bulk_copy() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#endif

}  // namespace rwkv
