#include "tests/support/host_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <ucontext.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace rwkv::host_device {
namespace {

constexpr size_t kStackBytes = size_t{1} << 17;
constexpr uint32_t kWarp = 32;

// What an mbarrier's 64 bits hold here.
struct BarrierWord {
  uint16_t expected;
  uint16_t pending;
  int32_t phase_and_bytes;  // parity of the current phase, then twice the bytes to come
};
static_assert(sizeof(BarrierWord) == sizeof(uint64_t));

BarrierWord load(const uint64_t* barrier) {
  BarrierWord word;
  std::memcpy(&word, barrier, sizeof word);
  return word;
}
void store(uint64_t* barrier, BarrierWord word) {
  if (word.pending == 0 && word.phase_and_bytes / 2 == 0) {
    word.phase_and_bytes ^= 1;
    word.pending = word.expected;
  }
  std::memcpy(barrier, &word, sizeof word);
}

struct Block;

struct ThreadCopy {
  void* to;
  const void* from;
  uint32_t bytes;
};

struct Fiber {
  ucontext_t context;
  ThreadPlace place;
  Block* block;
  uint32_t warp;
  uint32_t lane;
  bool ended = false;
  // What it waits for, in words, and until when; null: nothing.
  const char* waits = nullptr;
  const uint64_t* barrier = nullptr;  // an mbarrier's phase of this parity, or a release
  uint32_t parity = 0;
  uint32_t mask = 0;  // of the lanes it waits for
  void* fake_stack = nullptr;
  // Groups of asynchronous copies; the last one is still open.
  std::deque<std::vector<ThreadCopy>> copies{1};
};

struct Warp {
  Fiber* lanes[kWarp] = {};
  uint64_t values[kWarp] = {};
  uint32_t ballot = 0;
};

struct FreeMemory {
  void operator()(void* memory) const { std::free(memory); }
};

struct Cluster;

struct Block {
  Cluster* cluster;
  uint32_t rank;
  std::deque<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t alive = 0;
  uint32_t arrived = 0;
  bool any_next = false;
  bool any_result = false;
  std::unique_ptr<void, FreeMemory> shared;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes;
  uint64_t* barrier;
};

// The blocks that run together.
struct Cluster {
  std::deque<Block> blocks;
  uint32_t alive = 0;
  uint32_t arrived = 0;
  std::vector<Copy> copies;
};

struct Runner {
  const std::function<void()>* body = nullptr;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::vector<std::unique_ptr<char[]>> stacks;
  uint64_t lane_order = 0;
};

Runner& runner() {
  static Runner instance;
  return instance;
}

// ---- Switching between fibers -------------------------------------------------------------------

// AddressSanitizer must know whose stack is in use.
void before_switch([[maybe_unused]] void** fake_stack,
                   [[maybe_unused]] const void* stack,
                   [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#endif
}
void after_switch([[maybe_unused]] void* fake_stack,
                  [[maybe_unused]] const void** stack,
                  [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#endif
}

void resume(Fiber& fiber) {
  Runner& run = runner();
  run.current = &fiber;
  void* fake_stack = nullptr;
  before_switch(&fake_stack, fiber.context.uc_stack.ss_sp, fiber.context.uc_stack.ss_size);
  swapcontext(&run.scheduler, &fiber.context);
  after_switch(fake_stack, nullptr, nullptr);
  run.current = nullptr;
}

void leave() {
  Runner& run = runner();
  Fiber& fiber = *run.current;
  before_switch(
      fiber.ended ? nullptr : &fiber.fake_stack, run.scheduler_stack, run.scheduler_stack_bytes);
  swapcontext(&fiber.context, &run.scheduler);
  after_switch(fiber.fake_stack, nullptr, nullptr);
}

void release_block(Block& block) {
  block.arrived = 0;
  block.any_result = block.any_next;
  block.any_next = false;
  for (Fiber& fiber : block.fibers) {
    if (fiber.waits != nullptr && std::string_view(fiber.waits) == "__syncthreads") {
      fiber.waits = nullptr;
    }
  }
}

void release_cluster(Cluster& cluster) {
  cluster.arrived = 0;
  for (Block& block : cluster.blocks) {
    for (Fiber& fiber : block.fibers) {
      if (fiber.waits != nullptr && std::string_view(fiber.waits) == "cluster_barrier") {
        fiber.waits = nullptr;
      }
    }
  }
}

void enter_fiber() {
  Runner& run = runner();
  after_switch(nullptr, &run.scheduler_stack, &run.scheduler_stack_bytes);
  (*run.body)();
  Fiber& fiber = *run.current;
  fiber.ended = true;
  Block& block = *fiber.block;
  Cluster& cluster = *block.cluster;
  --block.alive;
  --cluster.alive;
  // Those who have ended are not waited for.
  if (block.arrived > 0 && block.arrived == block.alive) {
    release_block(block);
  }
  if (cluster.arrived > 0 && cluster.arrived == cluster.alive) {
    release_cluster(cluster);
  }
  leave();
}

bool can_go_on(const Fiber& fiber) {
  if (fiber.waits == nullptr) {
    return true;
  }
  return fiber.barrier != nullptr &&
         static_cast<uint32_t>(load(fiber.barrier).phase_and_bytes & 1) != fiber.parity;
}

[[noreturn]] void report_deadlock(const Cluster& cluster) {
  for (const Block& block : cluster.blocks) {
    for (const Fiber& fiber : block.fibers) {
      if (!fiber.ended) {
        std::fprintf(stderr,
                     "host device: block (%u, %u, %u), thread %u waits for ever in %s\n",
                     fiber.place.block.x,
                     fiber.place.block.y,
                     fiber.place.block.z,
                     fiber.place.thread.x,
                     fiber.waits);
      }
    }
  }
  std::abort();
}

void run_cluster(Cluster& cluster, std::mt19937_64& random) {
  std::vector<Fiber*> order;
  for (Block& block : cluster.blocks) {
    for (Fiber& fiber : block.fibers) {
      order.push_back(&fiber);
    }
  }
  while (!order.empty()) {
    if (runner().lane_order != 0) {
      std::shuffle(order.begin(), order.end(), random);
    }
    bool progress = false;
    for (Fiber* fiber : order) {
      if (!fiber->ended && can_go_on(*fiber)) {
        fiber->waits = nullptr;
        fiber->barrier = nullptr;
        resume(*fiber);
        progress = true;
      }
    }
    std::erase_if(order, [](const Fiber* fiber) { return fiber->ended; });
    if (progress) {
      continue;
    }
    if (cluster.copies.empty()) {
      report_deadlock(cluster);
    }
    for (const Copy& copy : cluster.copies) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      BarrierWord word = load(copy.barrier);
      word.phase_and_bytes -= static_cast<int32_t>(2 * copy.bytes);
      store(copy.barrier, word);
    }
    cluster.copies.clear();
  }
}

// ---- Laying out a launch ------------------------------------------------------------------------

dim3 cluster_shape(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      const auto& shape = config.attrs[i].val.clusterDim;
      return {shape.x, shape.y, shape.z};
    }
  }
  return {1, 1, 1};
}

void add_block(Cluster& cluster, const cudaLaunchConfig_t& config, uint3 place) {
  Runner& run = runner();
  const dim3 size = config.blockDim;
  const uint32_t threads = size.x * size.y * size.z;
  Block& block = cluster.blocks.emplace_back();
  block.cluster = &cluster;
  block.rank = static_cast<uint32_t>(cluster.blocks.size() - 1);
  block.alive = threads;
  block.warps.resize((threads + kWarp - 1) / kWarp);
  if (config.dynamicSmemBytes > 0) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, config.dynamicSmemBytes) != 0) {
      std::abort();
    }
    // NaN in every floating-point format.
    std::memset(memory, 0xff, config.dynamicSmemBytes);
    block.shared.reset(memory);
  }
  for (uint32_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers.emplace_back();
    fiber.place = {.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)},
                   .block = place,
                   .block_size = size,
                   .grid_size = config.gridDim};
    fiber.block = &block;
    fiber.warp = i / kWarp;
    fiber.lane = i % kWarp;
    block.warps[fiber.warp].lanes[fiber.lane] = &fiber;
    const size_t stack = cluster.alive++;
    if (stack == run.stacks.size()) {
      run.stacks.push_back(std::make_unique_for_overwrite<char[]>(kStackBytes));
    }
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = run.stacks[stack].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &enter_fiber, 0);
  }
}

Fiber& self() {
  return *runner().current;
}

void wait_in(const char* what) {
  self().waits = what;
  leave();
}

}  // namespace

void set_lane_order(uint64_t seed) {
  runner().lane_order = seed;
}

const ThreadPlace& here() {
  return self().place;
}

void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  runner().body = &body;
  std::mt19937_64 random(runner().lane_order);
  const dim3 shape = cluster_shape(config);
  const dim3 grid = config.gridDim;
  if (grid.x % shape.x != 0 || grid.y % shape.y != 0 || grid.z % shape.z != 0) {
    std::fprintf(stderr, "host device: the grid is no multiple of the cluster\n");
    std::abort();
  }
  for (uint32_t z = 0; z < grid.z; z += shape.z) {
    for (uint32_t y = 0; y < grid.y; y += shape.y) {
      for (uint32_t x = 0; x < grid.x; x += shape.x) {
        Cluster cluster;
        for (uint32_t i = 0; i < shape.x * shape.y * shape.z; ++i) {
          add_block(cluster,
                    config,
                    {x + i % shape.x, y + i / shape.x % shape.y, z + i / (shape.x * shape.y)});
        }
        run_cluster(cluster, random);
      }
    }
  }
}

// ---- What fibers call ---------------------------------------------------------------------------

void block_barrier() {
  Block& block = *self().block;
  if (++block.arrived == block.alive) {
    release_block(block);
    // Others go first as often as not: it is a turn like any other.
    self().waits = nullptr;
    leave();
    return;
  }
  wait_in("__syncthreads");
}

bool block_any(bool predicate) {
  Block& block = *self().block;
  block.any_next = block.any_next || predicate;
  block_barrier();
  return block.any_result;
}

void warp_barrier(uint32_t mask) {
  Fiber& fiber = self();
  Warp& warp = fiber.block->warps[fiber.warp];
  uint32_t present = 0;
  bool all_here = true;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    const Fiber* other = warp.lanes[lane];
    if (other == nullptr || (mask >> lane & 1) == 0) {
      continue;
    }
    present |= uint32_t{1} << lane;
    all_here = all_here && (other == &fiber || (other->waits != nullptr && other->mask == mask));
  }
  if ((present >> fiber.lane & 1) == 0) {
    std::fprintf(stderr, "host device: a lane waits for a mask that it is not in\n");
    std::abort();
  }
  if (!all_here) {
    fiber.mask = mask;
    wait_in("a warp's barrier or shuffle");
    return;
  }
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if ((present >> lane & 1) != 0) {
      warp.lanes[lane]->waits = nullptr;
      warp.lanes[lane]->mask = 0;
    }
  }
  leave();
}

uint64_t warp_exchange(uint32_t mask, uint64_t value, uint32_t from) {
  Fiber& fiber = self();
  Warp& warp = fiber.block->warps[fiber.warp];
  warp.values[fiber.lane] = value;
  warp_barrier(mask);
  const uint64_t result = warp.values[from];
  warp_barrier(mask);
  return result;
}

uint32_t warp_ballot(uint32_t mask, bool predicate) {
  Fiber& fiber = self();
  Warp& warp = fiber.block->warps[fiber.warp];
  warp.values[fiber.lane] = predicate;
  warp_barrier(mask);
  uint32_t result = 0;
  for (uint32_t lane = 0; lane < kWarp; ++lane) {
    if (warp.lanes[lane] != nullptr && (mask >> lane & 1) != 0 && warp.values[lane] != 0) {
      result |= uint32_t{1} << lane;
    }
  }
  warp_barrier(mask);
  return result;
}

void* shared_memory() {
  return self().block->shared.get();
}
uint32_t cluster_rank() {
  return self().block->rank;
}
uint32_t cluster_size() {
  return static_cast<uint32_t>(self().block->cluster->blocks.size());
}

void cluster_barrier() {
  Cluster& cluster = *self().block->cluster;
  if (++cluster.arrived == cluster.alive) {
    release_cluster(cluster);
    leave();
    return;
  }
  wait_in("cluster_barrier");
}

void* peer_shared(void* own, uint32_t rank) {
  Block& block = *self().block;
  const ptrdiff_t offset = static_cast<char*>(own) - static_cast<char*>(block.shared.get());
  return static_cast<char*>(block.cluster->blocks[rank].shared.get()) + offset;
}

void async_copy(void* shared, const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 ||
      reinterpret_cast<uintptr_t>(global) % bytes != 0) {
    std::fprintf(stderr, "host device: a copy of %u bytes is not aligned to its size\n", bytes);
    std::abort();
  }
  self().copies.back().push_back({shared, global, bytes});
}

void async_copy_commit() {
  self().copies.emplace_back();
}

void async_copy_wait(int pending) {
  auto& groups = self().copies;
  while (groups.size() > static_cast<size_t>(pending) + 1) {
    for (const ThreadCopy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

void mbarrier_init(uint64_t* barrier, uint32_t expected) {
  const BarrierWord word{.expected = static_cast<uint16_t>(expected),
                         .pending = static_cast<uint16_t>(expected),
                         .phase_and_bytes = 0};
  std::memcpy(barrier, &word, sizeof word);
}

void mbarrier_arrive(uint64_t* barrier) {
  mbarrier_arrive_expect(barrier, 0);
}

void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  BarrierWord word = load(barrier);
  --word.pending;
  word.phase_and_bytes += static_cast<int32_t>(2 * bytes);
  store(barrier, word);
}

void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  if (static_cast<uint32_t>(load(barrier).phase_and_bytes & 1) != parity) {
    return;
  }
  self().barrier = barrier;
  self().parity = parity;
  wait_in("mbarrier_wait");
}

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  const bool aligned = reinterpret_cast<uintptr_t>(shared) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(global) % 16 == 0 && bytes % 16 == 0;
  if (!aligned) {
    std::fprintf(stderr, "host device: a bulk copy of %u bytes is not 16-byte aligned\n", bytes);
    std::abort();
  }
  self().block->cluster->copies.push_back({shared, global, bytes, barrier});
}

}  // namespace rwkv::host_device

// ---- The part of the CUDA runtime that launchers and tests call ---------------------------------

// A few, so that the launchers' loops over a small grid take several turns.
constexpr int kMultiprocessors = 3;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = std::malloc(bytes);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* pointer) {
  std::free(pointer);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  // Of no bytes the pointers may be null, which memcpy does not allow.
  if (bytes > 0) {
    std::memcpy(to, from, bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(
    void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaMemcpy2DAsync(void* to,
                              size_t to_pitch,
                              const void* from,
                              size_t from_pitch,
                              size_t row_bytes,
                              size_t rows,
                              cudaMemcpyKind,
                              cudaStream_t) {
  for (size_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(to) + row * to_pitch,
                static_cast<const char*>(from) + row * from_pitch,
                row_bytes);
  }
  return cudaSuccess;
}
cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(pointer, value, bytes);
}
cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the host device";
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = kMultiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    // Of compute capability 9.0.
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = 228 * 1024;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = 1024;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
