// wkv4 as a scan over chunks of T, forward and backward. The maths is in wkv4_scan.cuh, the work on
// a tile of 128 tokens in wkv4_tile.cuh.
//
// Launch shape: a block of 128 threads owns a batch row, 64 bytes of channels and a segment of T,
// and walks its tiles while the next one is copied (cp.async, two stages). Where batch rows and
// channels alone give a block per multiprocessor, a segment is all of T and every tensor is touched
// once. With fewer, T is split: a first kernel finds each tile's sums, a second puts them together
// in order, and the third is the same as without a split. Shared memory is 17 KB a tensor and two
// stages, and 3 to 6 KB of sums: forward 37 KB (54 KB with a gate), backward 57 KB (74 KB), so 5
// and 3 (4 and 3) blocks a multiprocessor of an H100, with 96 and 168 registers a thread (before
// sm_90 fewer blocks, and so up to 229 registers). Floor, bytes an element in bf16: forward 6, with
// a gate 8; backward 10, with a gate 14. Carries add 0.1. A split reads the inputs once more: 10,
// 12; 16, 22. Assumed: w_log < 0; nothing else of the inputs' range.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/wkv4_launch.h"
#include "cuda/wkv4_pass.cuh"

namespace rwkv::wkv4 {
namespace {

// What a pass over the tiles is for: the sums of each tile, or the results.
enum class Task { kTileSums, kResults };

struct Plan {
  int64_t tiles;
  int64_t channel_blocks;
  int64_t segments;
  int64_t tiles_per_segment;
};

// With a block per multiprocessor a split saves less than its second reading costs; below that,
// four blocks a multiprocessor hide latency. A segment of one tile would not overlap its copies.
constexpr int64_t kBlocksWanted = 4;
constexpr int64_t kFewestTiles = 2;

cudaError_t make_plan(int64_t B, int64_t T, int64_t A, int64_t channels, Plan& plan) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  plan.tiles = num_tiles(T);
  plan.channel_blocks = ceil_div(A, channels);
  const int64_t blocks = B * plan.channel_blocks;
  plan.tiles_per_segment = plan.tiles;
  if (blocks < multiprocessors) {
    const int64_t wanted = ceil_div(kBlocksWanted * multiprocessors, blocks);
    plan.tiles_per_segment = std::max(kFewestTiles, ceil_div(plan.tiles, wanted));
  }
  plan.segments = ceil_div(plan.tiles, plan.tiles_per_segment);
  return error;
}

LaunchShape shape_of(const Plan& plan, int64_t B, size_t shared_bytes) {
  return {.grid = dim3(static_cast<unsigned>(B * plan.segments * plan.channel_blocks)),
          .block = dim3(kThreads),
          .shared_bytes = shared_bytes};
}

// Scratch memory of a split: sums of each tile, [B, tiles, 3, A], and whether a document starts in
// it, [B, tiles].
struct TileSums {
  float* sums;  // null without a split
  float* has_start;

  __device__ __forceinline__ float* of(int64_t tile_of_all, int64_t dim) const {
    return sums + tile_of_all * 3 * dim;
  }
};
int64_t tile_sums_floats(const Plan& plan, int64_t B, int64_t A) {
  return plan.segments == 1 ? 0 : B * plan.tiles * (3 * A + 1);
}
TileSums tile_sums_at(float* scratch, const Plan& plan, int64_t B, int64_t A) {
  return plan.segments == 1 ? TileSums{nullptr, nullptr}
                            : TileSums{scratch, scratch + B * plan.tiles * 3 * A};
}

template <typename Element, Task kTask>
struct ChunkWalk {
  static constexpr bool kSumsOnly = kTask == Task::kTileSums;
  static constexpr bool kPublishes = kSumsOnly;

  int64_t b;
  int64_t first_channel;
  int64_t segment;
  int64_t begin, end;  // tiles
  int steps;
  Direction direction;
  const float* entering;

  int64_t tiles;
  int64_t seq_len, dim;
  bool vectors;
  TileSums tile_sums;

  // Neighbouring blocks share rows of memory.
  __device__ __forceinline__ ChunkWalk(
      const Plan& plan, const TileSums& sums, Direction way, int64_t T, int64_t A, bool in_vectors)
      : direction(way),
        tiles(plan.tiles),
        seq_len(T),
        dim(A),
        vectors(in_vectors),
        tile_sums(sums) {
    const int64_t row = blockIdx.x / plan.channel_blocks;
    first_channel = blockIdx.x % plan.channel_blocks * kChannels<Element>;
    segment = row % plan.segments;
    b = row / plan.segments;
    begin = segment * plan.tiles_per_segment;
    end = begin + plan.tiles_per_segment < tiles ? begin + plan.tiles_per_segment : tiles;
    steps = static_cast<int>(end - begin);
    entering = kSumsOnly || sums.sums == nullptr ? nullptr : sums.of(b * tiles + tile(0), dim);
  }

  __device__ __forceinline__ int64_t tile(int step) const {
    return direction == Direction::kForward ? begin + step : end - 1 - step;
  }
  template <int kInputs>
  __device__ __forceinline__ void start(int step,
                                        InputTile (&inputs)[kInputs],
                                        const Element* const (&rows)[kInputs]) const {
    // The warp is done with the stage that is filled.
    __syncwarp();
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        start_copy(inputs[i], rows[i], tile(step) * kTileLen, seq_len, first_channel, dim, vectors);
      }
    }
    async_copy_commit();
  }
  // All but the next step's.
  __device__ __forceinline__ void wait(int) const {
    async_copy_wait<kStages - 1>();
    __syncwarp();
  }
  __device__ __forceinline__ void publish(int step, int channel, const TileTotal& total) const {
    const int64_t tile_of_all = b * tiles + tile(step);
    const int64_t c = first_channel + channel;
    store_sums(tile_sums.of(tile_of_all, dim), dim, c, total.sums);
    if (c == 0) {
      tile_sums.has_start[tile_of_all] = total.has_start ? 1.0f : 0.0f;
    }
  }
  __device__ __forceinline__ void meet() const {}
  __device__ __forceinline__ bool ends_sequence() const {
    return end == tiles;
  }
  __device__ __forceinline__ bool begins_sequence() const {
    return begin == 0;
  }
};

template <typename Element, bool kGate, Task kTask>
__global__ void __launch_bounds__(kThreads, 5) chunk_forward_kernel(const Wkv4Forward<Element> args,
                                                                    const Plan plan,
                                                                    const Layout layout,
                                                                    const TileSums tile_sums) {
  ChunkWalk<Element, kTask> walk(
      plan, tile_sums, Direction::kForward, args.T, args.A, layout.vectors);
  forward_pass<kGate>(
      args, layout.words, *static_cast<ForwardShared<kGate>*>(shared_memory()), walk);
}

// That share a multiprocessor, as far as shared memory goes: 3 of 58 or 76 KB in the 227 KB of
// sm_90 and up, 2 in the 163 KB of sm_80, 1 in the 99 KB of sm_86 and 89. With 2, every register is
// theirs.
constexpr int kBackwardBlocks = kArchitecture >= 900 ? 3 : 2;

template <typename Element, bool kGate, Task kTask>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks)
    chunk_backward_kernel(const Wkv4Backward<Element> args,
                          const Plan plan,
                          const Layout layout,
                          const TileSums tile_sums,
                          float* __restrict__ dw_rows,
                          float* __restrict__ du_rows) {
  ChunkWalk<Element, kTask> walk(
      plan, tile_sums, Direction::kBackward, args.T, args.A, layout.vectors);
  const int64_t row = (walk.b * plan.segments + walk.segment) * args.A;
  backward_pass<kGate>(args,
                       layout.words,
                       dw_rows + row,
                       du_rows + row,
                       *static_cast<BackwardShared<kGate>*>(shared_memory()),
                       walk);
}

// ---- Putting tiles together ---------------------------------------------------------------------

// Replaces each tile's sums by what enters the tile, in order: `state` [B, 3, A] before the first,
// or the adjoint of `dstate_out` behind the last. A thread per batch row and channel.
template <Direction kDirection>
__global__ void __launch_bounds__(kThreads)
    spread_tiles_kernel(TileSums tile_sums,
                        const float* __restrict__ w_log,
                        const float* __restrict__ state,
                        const float* __restrict__ dstate_out,
                        const float* __restrict__ carries,
                        int64_t B,
                        int64_t T,
                        int64_t dim) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= B * dim) {
    return;
  }
  const int64_t b = thread / dim;
  const int64_t c = thread % dim;
  const int64_t tiles = ceil_div(T, kTileLen);
  const float w2 = w_log[c] * kLog2E;
  Sums incoming;
  if constexpr (kDirection == Direction::kForward) {
    incoming = load_state(state + b * 3 * dim, dim, c);
  } else {
    const float final_p = carries[(b * (tiles + 1) + tiles) * 3 * dim + 2 * dim + c];
    incoming =
        load_adjoint(dstate_out == nullptr ? nullptr : dstate_out + b * 3 * dim, final_p, dim, c);
  }
  // Loaded together, so that their latency counts once.
  constexpr int kAtOnce = 8;
  for (int64_t first = 0; first < tiles; first += kAtOnce) {
    TileTotal totals[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < tiles) {
        const int64_t tile = kDirection == Direction::kForward ? first + i : tiles - 1 - first - i;
        totals[i] = {load_sums(tile_sums.of(b * tiles + tile, dim), dim, c),
                     tile_sums.has_start[b * tiles + tile] != 0.0f};
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < tiles) {
        const int64_t tile = kDirection == Direction::kForward ? first + i : tiles - 1 - first - i;
        store_sums(tile_sums.of(b * tiles + tile, dim), dim, c, incoming);
        incoming = across_tile(incoming, w2, tile_len_of(tile, T), totals[i]);
      }
    }
  }
}

// ---- Launching ----------------------------------------------------------------------------------

template <Direction kDirection, typename Args>
cudaError_t launch_spread_tiles(const Args& args,
                                const TileSums& tile_sums,
                                const float* dstate_out,
                                const float* carries,
                                cudaStream_t stream) {
  const LaunchShape shape{.grid = dim3(static_cast<unsigned>(ceil_div(args.B * args.A, kThreads))),
                          .block = dim3(kThreads)};
  return launch_kernel(&spread_tiles_kernel<kDirection>,
                       shape,
                       stream,
                       tile_sums,
                       args.w_log,
                       args.state,
                       dstate_out,
                       carries,
                       args.B,
                       args.T,
                       args.A);
}

template <typename Element, bool kGate>
cudaError_t launch_forward(const Wkv4Forward<Element>& args,
                           const Plan& plan,
                           cudaStream_t stream) {
  const Layout layout = layout_of<Element>(args.A, {args.k, args.v, args.r}, {args.y});
  const TileSums tile_sums = tile_sums_at(args.scratch, plan, args.B, args.A);
  if (tile_sums.sums != nullptr) {
    cudaError_t error = launch_kernel(&chunk_forward_kernel<Element, false, Task::kTileSums>,
                                      shape_of(plan, args.B, sizeof(ForwardShared<false>)),
                                      stream,
                                      args,
                                      plan,
                                      layout,
                                      tile_sums);
    if (error == cudaSuccess) {
      error = launch_spread_tiles<Direction::kForward>(args, tile_sums, nullptr, nullptr, stream);
    }
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_kernel(&chunk_forward_kernel<Element, kGate, Task::kResults>,
                       shape_of(plan, args.B, sizeof(ForwardShared<kGate>)),
                       stream,
                       args,
                       plan,
                       layout,
                       tile_sums);
}

template <typename Element, bool kGate>
cudaError_t launch_backward(const Wkv4Backward<Element>& args,
                            const Plan& plan,
                            cudaStream_t stream) {
  const Layout layout =
      layout_of<Element>(args.A, {args.k, args.v, args.dy, args.r}, {args.dk, args.dv, args.dr});
  const TileSums tile_sums = tile_sums_at(args.scratch, plan, args.B, args.A);
  const LaunchShape shape = shape_of(plan, args.B, sizeof(BackwardShared<kGate>));
  const int64_t rows = args.B * plan.segments;
  float* dw_rows = args.scratch + tile_sums_floats(plan, args.B, args.A);
  float* du_rows = dw_rows + rows * args.A;
  cudaError_t error = cudaSuccess;
  if (tile_sums.sums != nullptr) {
    error = launch_kernel(&chunk_backward_kernel<Element, kGate, Task::kTileSums>,
                          shape,
                          stream,
                          args,
                          plan,
                          layout,
                          tile_sums,
                          dw_rows,
                          du_rows);
    if (error == cudaSuccess) {
      error = launch_spread_tiles<Direction::kBackward>(
          args, tile_sums, args.dstate_out, args.carries, stream);
    }
  }
  if (error == cudaSuccess) {
    error = launch_kernel(&chunk_backward_kernel<Element, kGate, Task::kResults>,
                          shape,
                          stream,
                          args,
                          plan,
                          layout,
                          tile_sums,
                          dw_rows,
                          du_rows);
  }
  return error == cudaSuccess
             ? launch_parameter_sums(dw_rows, du_rows, rows, args.A, args.dw_log, args.du, stream)
             : error;
}

}  // namespace

template <typename Element>
int64_t chunk_scan_scratch_floats(int64_t B, int64_t T, int64_t A, bool backward) {
  Plan plan;
  if (make_plan(B, T, A, kChannels<Element>, plan) != cudaSuccess) {
    return 0;
  }
  return tile_sums_floats(plan, B, A) + (backward ? 2 * B * plan.segments * A : 0);
}

template <typename Element>
cudaError_t launch_chunk_scan(const Wkv4Forward<Element>& args, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = make_plan(args.B, args.T, args.A, kChannels<Element>, plan);
  if (error != cudaSuccess) {
    return error;
  }
  return args.r == nullptr ? launch_forward<Element, false>(args, plan, stream)
                           : launch_forward<Element, true>(args, plan, stream);
}

template <typename Element>
cudaError_t launch_chunk_scan_backward(const Wkv4Backward<Element>& args, cudaStream_t stream) {
  Plan plan;
  const cudaError_t error = make_plan(args.B, args.T, args.A, kChannels<Element>, plan);
  if (error != cudaSuccess) {
    return error;
  }
  return args.r == nullptr ? launch_backward<Element, false>(args, plan, stream)
                           : launch_backward<Element, true>(args, plan, stream);
}

#define RWKV_INSTANTIATE(Element)                                                       \
  template int64_t chunk_scan_scratch_floats<Element>(int64_t, int64_t, int64_t, bool); \
  template cudaError_t launch_chunk_scan(const Wkv4Forward<Element>&, cudaStream_t);    \
  template cudaError_t launch_chunk_scan_backward(const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv::wkv4
