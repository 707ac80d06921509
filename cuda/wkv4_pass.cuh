// The passes of wkv4 over the tiles of a block, forward and backward, for any walk. Steps are
// numbered as in wkv4_tile.cuh.
//
// A walk says which tiles a block takes and how it learns what enters them:
//   b, first_channel      the block's batch row and its first channel
//   steps                 number of tiles that it takes; tile(step) may lie beyond the last one
//   kSumsOnly             whether the sums of the tiles are all that is asked for
//   entering              what enters the first tile, planes [3, A]; null: the sequence's state, or
//                         the adjoint of its final state
//   start(step, ...)      starts copying a step's inputs, by all threads; nothing for step = steps
//   wait(step)            until they are there for the warp, or the block
//   kPublishes            whether other blocks, or kernels, need the totals of its tiles:
//     publish(step, ...)  a thread hands out its channel's
//     meet()              by all threads: totals of all blocks that share the sequence can be read
//     cross(...)          returns what enters this block's tile, and moves `running` beyond the
//                         tiles of the step; not with kSumsOnly
//   ends_sequence(), begins_sequence()   whether `running` has passed the last tile, or the first
#pragma once

#include "cuda/wkv4_tile.cuh"

namespace rwkv::wkv4 {

// Number of tokens of a tile; 0 beyond the end.
__device__ __forceinline__ int tile_len_of(int64_t tile, int64_t seq_len) {
  const int64_t rest = seq_len - tile * kTileLen;
  return rest < 0 ? 0 : rest < kTileLen ? static_cast<int>(rest) : kTileLen;
}

// A thread's channel enters the tile of a step: `table` gets what enters each sub-chunk, and
// `running` moves beyond the tile. Returns what it was before.
template <Direction kDirection, typename Walk>
__device__ __forceinline__ Sums enter(const Walk& walk,
                                      SumTable& table,
                                      const uint32_t* starts,
                                      int step,
                                      float w2,
                                      int64_t seq_len,
                                      Sums& running) {
  const int channel = static_cast<int>(threadIdx.x);
  const int tile_len = tile_len_of(walk.tile(step), seq_len);
  Sums incoming = running;
  if constexpr (Walk::kPublishes) {
    incoming = walk.cross(step, channel, w2, seq_len, running);
  }
  const TileTotal total = spread<kDirection>(table, starts, channel, w2, tile_len, incoming);
  if constexpr (!Walk::kPublishes) {
    running = across_tile(incoming, w2, tile_len, total);
  }
  return incoming;
}

// ---- Forward ------------------------------------------------------------------------------------

template <bool kGate>
struct ForwardShared {
  InputTile inputs[kStages][kGate ? 3 : 2];  // k, v, r
  SumTable states;
  uint32_t starts[kSubs];
};

template <bool kGate, typename Element, typename Walk>
__device__ __forceinline__ void forward_pass(const Wkv4Forward<Element>& args,
                                             bool words,
                                             ForwardShared<kGate>& shared,
                                             Walk& walk) {
  constexpr int kNum = kPer<Element>;
  const int64_t dim = args.A;
  const int64_t tiles = ceil_div(args.T, kTileLen);
  const int64_t row = walk.b * args.T * dim;
  const bool* starts = args.starts == nullptr ? nullptr : args.starts + walk.b * args.T;
  float* carries =
      args.carries == nullptr ? nullptr : args.carries + walk.b * (tiles + 1) * 3 * dim;
  const LaneChannels<Element> lane(walk.first_channel, dim);
  Channel channels[kNum];
  lane.load_channels(args.w_log, args.u, channels);

  // One thread per channel puts the sub-chunks together.
  const int64_t summed = walk.first_channel + threadIdx.x;
  const bool sums_channel = threadIdx.x < kChannels<Element> && summed < dim;
  float w2 = 0.0f;
  Sums state = nothing();
  if (sums_channel) {
    w2 = args.w_log[summed] * kLog2E;
    state = walk.entering == nullptr ? load_state(args.state + walk.b * 3 * dim, dim, summed)
                                     : load_sums(walk.entering, dim, summed);
  }

  const auto start_step = [&](int step) {
    auto& inputs = shared.inputs[step % kStages];
    if constexpr (kGate) {
      walk.start(step, inputs, {args.k + row, args.v + row, args.r + row});
    } else {
      walk.start(step, inputs, {args.k + row, args.v + row});
    }
    return step < walk.steps && starts_at_own_token(starts, walk.tile(step) * kTileLen, args.T);
  };

  bool next_starts = start_step(0);
  for (int step = 0; step < walk.steps; ++step) {
    const int64_t tile = walk.tile(step);
    const uint32_t start_bits = starts_of_sub(next_starts);
    next_starts = start_step(step + 1);
    walk.wait(step);

    const int tile_len = tile_len_of(tile, args.T);
    const InputTile(&inputs)[kGate ? 3 : 2] = shared.inputs[step % kStages];
    const SubChunk<Element> chunk{own_column<Element>(inputs[0]),
                                  own_column<Element>(inputs[1]),
                                  lane.count > 0 ? tokens_of(lane.sub, tile_len) : 0,
                                  start_bits};
    KeyRange range[kNum];
    Sums sums[kNum];
    sum_tokens(chunk, channels, range, sums);
    lane.set(shared.states, sums);
    if (threadIdx.x % kRowLanes == 0) {
      shared.starts[lane.sub] = start_bits;
    }
    __syncthreads();
    const int channel = static_cast<int>(threadIdx.x);
    if constexpr (Walk::kPublishes) {
      if (sums_channel) {
        walk.publish(
            step,
            channel,
            total_of<Direction::kForward>(shared.states, shared.starts, channel, w2, tile_len));
      }
      walk.meet();
    }
    if constexpr (!Walk::kSumsOnly) {
      if (sums_channel) {
        const Sums incoming =
            enter<Direction::kForward>(walk, shared.states, shared.starts, step, w2, args.T, state);
        if (carries != nullptr && tile < tiles) {
          store_sums(carries + tile * 3 * dim, dim, summed, incoming);
        }
      }
    }
    __syncthreads();
    if constexpr (!Walk::kSumsOnly) {
      Sums before[kNum];
      lane.get(shared.states, before);
      Column<Element> gate{};
      if constexpr (kGate) {
        gate = own_column<Element>(inputs[2]);
      }
      write_averages<kGate>(chunk,
                            gate,
                            channels,
                            range,
                            before,
                            lane.output(args.y + row, tile * kTileLen, dim, words));
    }
  }

  if (!Walk::kSumsOnly && sums_channel && walk.ends_sequence()) {
    store_state(args.state_out + walk.b * 3 * dim, dim, summed, state);
    if (carries != nullptr) {
      store_sums(carries + tiles * 3 * dim, dim, summed, state);
    }
  }
}

// ---- Backward -----------------------------------------------------------------------------------

template <bool kGate>
struct BackwardShared {
  InputTile inputs[kStages][kGate ? 4 : 3];  // k, v, dy, r
  SumTable states;
  SumTable adjoints;
  uint32_t starts[kSubs];
};

// dw_row and du_row [A]: this block's part of the parameters' gradients.
template <bool kGate, typename Element, typename Walk>
__device__ __forceinline__ void backward_pass(const Wkv4Backward<Element>& args,
                                              bool words,
                                              float* dw_row,
                                              float* du_row,
                                              BackwardShared<kGate>& shared,
                                              Walk& walk) {
  constexpr int kNum = kPer<Element>;
  const int64_t dim = args.A;
  const int64_t tiles = ceil_div(args.T, kTileLen);
  const int64_t row = walk.b * args.T * dim;
  const bool* starts = args.starts == nullptr ? nullptr : args.starts + walk.b * args.T;
  const float* carries = args.carries + walk.b * (tiles + 1) * 3 * dim;
  const LaneChannels<Element> lane(walk.first_channel, dim);
  Channel channels[kNum];
  lane.load_channels(args.w_log, args.u, channels);

  const int64_t summed = walk.first_channel + threadIdx.x;
  const bool sums_channel = threadIdx.x < kChannels<Element> && summed < dim;
  float w2 = 0.0f;
  Sums adjoint = nothing();
  if (sums_channel) {
    w2 = args.w_log[summed] * kLog2E;
    adjoint = walk.entering != nullptr
                  ? load_sums(walk.entering, dim, summed)
                  : load_adjoint(
                        args.dstate_out == nullptr ? nullptr : args.dstate_out + walk.b * 3 * dim,
                        carries[tiles * 3 * dim + 2 * dim + summed],
                        dim,
                        summed);
  }

  const auto start_step = [&](int step) {
    auto& inputs = shared.inputs[step % kStages];
    if constexpr (kGate) {
      walk.start(step, inputs, {args.k + row, args.v + row, args.dy + row, args.r + row});
    } else {
      walk.start(step, inputs, {args.k + row, args.v + row, args.dy + row});
    }
    return step < walk.steps && starts_at_own_token(starts, walk.tile(step) * kTileLen, args.T);
  };

  float dw_log[kNum] = {};
  float du[kNum] = {};
  bool next_starts = start_step(0);
  for (int step = 0; step < walk.steps; ++step) {
    const int64_t tile = walk.tile(step);
    const uint32_t start_bits = starts_of_sub(next_starts);
    next_starts = start_step(step + 1);
    Sums state = nothing();
    if (sums_channel && tile < tiles) {
      state = load_sums(carries + tile * 3 * dim, dim, summed);
    }
    walk.wait(step);

    const int tile_len = tile_len_of(tile, args.T);
    const int channel = static_cast<int>(threadIdx.x);
    const InputTile(&columns)[kGate ? 4 : 3] = shared.inputs[step % kStages];
    const SubChunk<Element> chunk{own_column<Element>(columns[0]),
                                  own_column<Element>(columns[1]),
                                  lane.count > 0 ? tokens_of(lane.sub, tile_len) : 0,
                                  start_bits};
    BackwardInputs<Element> inputs{};
    inputs.dy = own_column<Element>(columns[2]);
    if constexpr (kGate) {
      inputs.r = own_column<Element>(columns[3]);
      if constexpr (!Walk::kSumsOnly) {
        inputs.dr = lane.output(args.dr + row, tile * kTileLen, dim, words);
      }
    }
    KeyRange range[kNum];
    Sums sums[kNum];
    sum_tokens(chunk, channels, range, sums);
    lane.set(shared.states, sums);
    if (threadIdx.x % kRowLanes == 0) {
      shared.starts[lane.sub] = start_bits;
    }
    __syncthreads();
    if (sums_channel) {
      spread<Direction::kForward>(shared.states, shared.starts, channel, w2, tile_len, state);
    }
    __syncthreads();
    Sums before[kNum];
    lane.get(shared.states, before);
    Kept<Element> kept;
    sum_adjoints<kGate, !Walk::kSumsOnly>(chunk, inputs, channels, range, before, kept, sums);
    lane.set(shared.adjoints, sums);
    __syncthreads();
    if constexpr (Walk::kPublishes) {
      if (sums_channel) {
        walk.publish(
            step,
            channel,
            total_of<Direction::kBackward>(shared.adjoints, shared.starts, channel, w2, tile_len));
      }
      walk.meet();
    }
    if constexpr (!Walk::kSumsOnly) {
      if (sums_channel) {
        enter<Direction::kBackward>(
            walk, shared.adjoints, shared.starts, step, w2, args.T, adjoint);
      }
    }
    __syncthreads();
    if constexpr (!Walk::kSumsOnly) {
      Sums behind[kNum];
      lane.get(shared.states, before);
      lane.get(shared.adjoints, behind);
      write_gradients<kGate>(chunk,
                             inputs,
                             channels,
                             range,
                             before,
                             behind,
                             kept,
                             lane.output(args.dk + row, tile * kTileLen, dim, words),
                             lane.output(args.dv + row, tile * kTileLen, dim, words),
                             dw_log,
                             du);
    }
  }
  if constexpr (!Walk::kSumsOnly) {
    if (sums_channel && walk.begins_sequence()) {
      store_dstate(
          args.dstate + walk.b * 3 * dim, args.state + walk.b * 3 * dim, dim, summed, adjoint);
    }
    Sums sums[kNum];
#pragma unroll
    for (int channel = 0; channel < kNum; ++channel) {
      sums[channel] = {dw_log[channel], du[channel], 0.0f};
    }
    lane.set(shared.states, sums);
    __syncthreads();
    if (sums_channel) {
      float dw_sum = 0.0f;
      float du_sum = 0.0f;
      for (int sub = 0; sub < kSubs; ++sub) {
        dw_sum += shared.states.a[sub][threadIdx.x];
        du_sum += shared.states.b[sub][threadIdx.x];
      }
      dw_row[summed] = dw_sum;
      du_row[summed] = du_sum;
    }
  }
}

}  // namespace rwkv::wkv4
