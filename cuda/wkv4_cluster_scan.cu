// wkv4 with the tiles of a sequence on the blocks of a cluster, forward and backward, sm_90 and up.
// The maths is in wkv4_scan.cuh, the work on a tile in wkv4_tile.cuh, the passes in wkv4_pass.cuh.
//
// Launch shape: a cluster of up to 8 blocks of 128 threads owns a batch row and 64 bytes of
// channels; at each step its blocks take neighbouring tiles of 128 tokens, tell each other the
// tiles' totals through distributed shared memory, and each puts them together in the order of
// time. So there are up to 8 times as many blocks as the chunk scan has without a split, and still
// every tensor is touched once. Rows of a tile (64 bytes) come by bulk copies, two stages, one
// barrier each. Shared memory and registers: as the chunk scan's, and 3 KB of totals. Floor, bytes
// an element in bf16: forward 6, with a gate 8; backward 10, with a gate 14. Carries add 0.1.
// Assumed: w_log < 0; rows begin at 16-byte boundaries.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/wkv4_launch.h"
#include "cuda/wkv4_pass.cuh"

namespace rwkv::wkv4 {
namespace {

// The largest that every such GPU takes.
constexpr int64_t kMostBlocks = 8;

struct Plan {
  int64_t tiles;
  int64_t channel_blocks;
  int64_t cluster_len;
};
template <typename Element>
Plan make_plan(int64_t T, int64_t A) {
  const int64_t tiles = num_tiles(T);
  return {.tiles = tiles,
          .channel_blocks = ceil_div(A, kChannels<Element>),
          .cluster_len = std::min(kMostBlocks, tiles)};
}

// A tile's totals, for the other blocks to read. Two, for a block may be a step ahead of one that
// still reads.
struct PublishedTotals {
  float a[2][kMostChannels];
  float b[2][kMostChannels];
  float p[2][kMostChannels];
  float has_start[2][kMostChannels];
};

template <typename PassShared>
struct ClusterShared {
  PassShared pass;
  PublishedTotals totals;
  uint64_t arrived[kStages];  // a stage's copies
};

template <typename Element, Direction kWay>
struct ClusterWalk {
  static constexpr bool kSumsOnly = false;
  static constexpr bool kPublishes = true;

  int64_t b;
  int64_t first_channel;
  int steps;
  const float* entering = nullptr;

  int rank;
  int cluster_len;
  int64_t tiles;
  int64_t seq_len, dim;
  PublishedTotals& totals;
  uint64_t* arrived;

  __device__ __forceinline__ ClusterWalk(
      const Plan& plan, int64_t T, int64_t A, PublishedTotals& shared_totals, uint64_t* barriers)
      : rank(static_cast<int>(cluster_rank())),
        cluster_len(static_cast<int>(plan.cluster_len)),
        tiles(plan.tiles),
        seq_len(T),
        dim(A),
        totals(shared_totals),
        arrived(barriers) {
    const int64_t cluster = blockIdx.x / plan.cluster_len;
    first_channel = cluster % plan.channel_blocks * kChannels<Element>;
    b = cluster / plan.channel_blocks;
    steps = static_cast<int>(ceil_div(tiles, plan.cluster_len));
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(&arrived[stage], 1);
      }
      mbarrier_fence_init();
    }
    __syncthreads();
  }

  __device__ __forceinline__ int64_t first_tile(int step) const {
    const int64_t turn = kWay == Direction::kForward ? step : steps - 1 - step;
    return turn * cluster_len;
  }
  __device__ __forceinline__ int64_t tile(int step) const { return first_tile(step) + rank; }

  // A thread copies a row of each input.
  template <int kInputs>
  __device__ __forceinline__ void start(int step,
                                        InputTile (&inputs)[kInputs],
                                        const Element* const (&rows)[kInputs]) const {
    if (step >= steps) {
      return;
    }
    // The block is done with the stage that is filled.
    fence_before_bulk_copy();
    __syncthreads();
    uint64_t* barrier = &arrived[step % kStages];
    const int64_t channels = min(static_cast<int64_t>(kChannels<Element>), dim - first_channel);
    const auto row_bytes = static_cast<uint32_t>(channels * static_cast<int64_t>(sizeof(Element)));
    if (threadIdx.x == 0) {
      const auto tokens = static_cast<uint32_t>(tile_len_of(tile(step), seq_len));
      mbarrier_arrive_expect(barrier, kInputs * tokens * row_bytes);
    }
    const int64_t t = tile(step) * kTileLen + threadIdx.x;
    if (t < seq_len) {
      const int sub = static_cast<int>(threadIdx.x) / kSubLen;
      const int token = static_cast<int>(threadIdx.x) % kSubLen;
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        bulk_copy_to_shared(inputs[i].bytes + sub * kSubBytes + token * kRowBytes,
                            rows[i] + t * dim + first_channel,
                            row_bytes,
                            barrier);
      }
    }
  }
  __device__ __forceinline__ void wait(int step) const {
    mbarrier_wait(&arrived[step % kStages], static_cast<uint32_t>(step / kStages % 2));
  }
  __device__ __forceinline__ void publish(int step, int channel, const TileTotal& total) const {
    totals.a[step % 2][channel] = total.sums.a;
    totals.b[step % 2][channel] = total.sums.b;
    totals.p[step % 2][channel] = total.sums.p;
    totals.has_start[step % 2][channel] = total.has_start ? 1.0f : 0.0f;
  }
  __device__ __forceinline__ void meet() const {
    __syncwarp();
    cluster_barrier();
  }
  // Every block goes through all totals, and so knows what leaves the step.
  __device__ __forceinline__ Sums
  cross(int step, int channel, float w2, int64_t T, Sums& running) const {
    Sums incoming = running;
    for (int i = 0; i < cluster_len; ++i) {
      const int from = kWay == Direction::kForward ? i : cluster_len - 1 - i;
      if (from == rank) {
        incoming = running;
      }
      const auto peer = static_cast<uint32_t>(from);
      const TileTotal total{{load_peer_shared(&totals.a[step % 2][channel], peer),
                             load_peer_shared(&totals.b[step % 2][channel], peer),
                             load_peer_shared(&totals.p[step % 2][channel], peer)},
                            load_peer_shared(&totals.has_start[step % 2][channel], peer) != 0.0f};
      running = across_tile(running, w2, tile_len_of(first_tile(step) + from, T), total);
    }
    return incoming;
  }
  __device__ __forceinline__ bool ends_sequence() const {
    return rank == 0;
  }
  __device__ __forceinline__ bool begins_sequence() const {
    return rank == 0;
  }
};

template <typename Element, bool kGate>
__global__ void __launch_bounds__(kThreads, 4)
    cluster_forward_kernel(const Wkv4Forward<Element> args, const Plan plan, bool words) {
  auto& shared = *static_cast<ClusterShared<ForwardShared<kGate>>*>(shared_memory());
  ClusterWalk<Element, Direction::kForward> walk(
      plan, args.T, args.A, shared.totals, shared.arrived);
  forward_pass<kGate>(args, words, shared.pass, walk);
  // Others may still read this block's totals.
  walk.meet();
}

template <typename Element, bool kGate>
__global__ void __launch_bounds__(kThreads, 3)
    cluster_backward_kernel(const Wkv4Backward<Element> args,
                            const Plan plan,
                            bool words,
                            float* __restrict__ dw_rows,
                            float* __restrict__ du_rows) {
  auto& shared = *static_cast<ClusterShared<BackwardShared<kGate>>*>(shared_memory());
  ClusterWalk<Element, Direction::kBackward> walk(
      plan, args.T, args.A, shared.totals, shared.arrived);
  const int64_t row = (walk.b * plan.cluster_len + walk.rank) * args.A;
  backward_pass<kGate>(args, words, dw_rows + row, du_rows + row, shared.pass, walk);
  // Others may still read this block's totals.
  walk.meet();
}

cudaError_t check_device() {
  int device = 0;
  int major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  return error != cudaSuccess ? error : major < 9 ? cudaErrorNotSupported : cudaSuccess;
}

LaunchShape shape_of(const Plan& plan, int64_t B, size_t shared_bytes) {
  return {.grid = dim3(static_cast<unsigned>(B * plan.channel_blocks * plan.cluster_len)),
          .block = dim3(kThreads),
          .shared_bytes = shared_bytes,
          .cluster_x = static_cast<unsigned>(plan.cluster_len)};
}

template <typename Element, bool kGate>
cudaError_t launch_forward(const Wkv4Forward<Element>& args, bool words, cudaStream_t stream) {
  const Plan plan = make_plan<Element>(args.T, args.A);
  return launch_kernel(&cluster_forward_kernel<Element, kGate>,
                       shape_of(plan, args.B, sizeof(ClusterShared<ForwardShared<kGate>>)),
                       stream,
                       args,
                       plan,
                       words);
}

template <typename Element, bool kGate>
cudaError_t launch_backward(const Wkv4Backward<Element>& args, bool words, cudaStream_t stream) {
  const Plan plan = make_plan<Element>(args.T, args.A);
  const int64_t rows = args.B * plan.cluster_len;
  float* dw_rows = args.scratch;
  float* du_rows = dw_rows + rows * args.A;
  cudaError_t error =
      launch_kernel(&cluster_backward_kernel<Element, kGate>,
                    shape_of(plan, args.B, sizeof(ClusterShared<BackwardShared<kGate>>)),
                    stream,
                    args,
                    plan,
                    words,
                    dw_rows,
                    du_rows);
  return error == cudaSuccess
             ? launch_parameter_sums(dw_rows, du_rows, rows, args.A, args.dw_log, args.du, stream)
             : error;
}

}  // namespace

template <typename Element>
int64_t cluster_scan_scratch_floats(int64_t B, int64_t T, int64_t A, bool backward) {
  return backward ? 2 * B * make_plan<Element>(T, A).cluster_len * A : 0;
}

template <typename Element>
cudaError_t launch_cluster_scan(const Wkv4Forward<Element>& args, cudaStream_t stream) {
  const Layout layout = layout_of<Element>(args.A, {args.k, args.v, args.r}, {args.y});
  const cudaError_t error = layout.vectors ? check_device() : cudaErrorNotSupported;
  if (error != cudaSuccess) {
    return error;
  }
  return args.r == nullptr ? launch_forward<Element, false>(args, layout.words, stream)
                           : launch_forward<Element, true>(args, layout.words, stream);
}

template <typename Element>
cudaError_t launch_cluster_scan_backward(const Wkv4Backward<Element>& args, cudaStream_t stream) {
  const Layout layout =
      layout_of<Element>(args.A, {args.k, args.v, args.dy, args.r}, {args.dk, args.dv, args.dr});
  const cudaError_t error = layout.vectors ? check_device() : cudaErrorNotSupported;
  if (error != cudaSuccess) {
    return error;
  }
  return args.r == nullptr ? launch_backward<Element, false>(args, layout.words, stream)
                           : launch_backward<Element, true>(args, layout.words, stream);
}

#define RWKV_INSTANTIATE(Element)                                                         \
  template int64_t cluster_scan_scratch_floats<Element>(int64_t, int64_t, int64_t, bool); \
  template cudaError_t launch_cluster_scan(const Wkv4Forward<Element>&, cudaStream_t);    \
  template cudaError_t launch_cluster_scan_backward(const Wkv4Backward<Element>&, cudaStream_t);
RWKV_INSTANTIATE(float)
RWKV_INSTANTIATE(__nv_bfloat16)
#undef RWKV_INSTANTIATE

}  // namespace rwkv::wkv4
