// What layer_norm_shift_mix's forward and backward have in common: how a block's threads share a
// row, the maths of a token, and how blocks share the tokens.
//
// Launch shape: a thread owns eight neighbouring channels (one 16-byte access a row in bf16), a
// block the whole row, C / 8 threads; so a block walks tokens, and what the next token needs stays
// in registers. The B * T tokens, rows of the batch one behind the other, are dealt out evenly to
// as many blocks as are resident at once: a block's tokens are neighbours, and it reads one row
// more than it has. Each way has two kernels: for rows of whole 16-byte vectors, which keeps what
// it can in registers, and for any other row, with registers for a block of 1,024 threads.
// Row sums go through shuffles and two buffers in shared memory: one barrier a step, for whoever
// writes a buffer again has passed the barrier behind its last reading.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/launch.h"
#include "cuda/layer_norm_shift_mix_kernel.h"
#include "cuda/packed.cuh"

namespace rwkv::layer_norm_shift_mix {

constexpr int kPerThread = 8;
constexpr int kPerWarp = kPerThread * kWarpSize;
constexpr int kMaxWarps = kMaxChannels / kPerWarp;

// Threads of the largest block of a kernel for whole vectors: with these, its registers suffice.
constexpr int kVectorThreads = 512;

// ---- A thread's channels ------------------------------------------------------------------------

// kVectors: rows are whole vectors. Threads beyond the row's end then read its beginning, so that
// no load stands behind a branch, and own nothing.
template <bool kVectors>
class Channels {
 public:
  __device__ __forceinline__ Channels(int64_t n_embd, bool vectors)
      : first_(threadIdx.x * kPerThread),
        count_(static_cast<int>(n_embd) - static_cast<int>(first_)),
        vectors_(vectors && count_ >= kPerThread) {}

  __device__ __forceinline__ bool owns(int i) const { return i < count_; }

  template <typename Element>
  __device__ __forceinline__ void load(const Element* row, float (&x)[kPerThread]) const {
    if (kVectors || vectors_) {
      load8(row + (count_ > 0 ? first_ : 0u), x);
    } else {
      load_first(row + first_, count_, x);
    }
  }
  template <typename Element>
  __device__ __forceinline__ Packed8<Element> load_packed(const Element* row) const {
    return load_packed8(row + (count_ > 0 ? first_ : 0u));
  }
  template <typename Element>
  __device__ __forceinline__ void store(Element* row, const float (&x)[kPerThread]) const {
    if (kVectors ? count_ > 0 : vectors_) {
      store8(row + first_, x);
    } else if (!kVectors) {
      store_first(row + first_, count_, x);
    }
  }

 private:
  // Unsigned: as an offset into memory, too, it is one register.
  uint32_t first_;
  int count_;  // channels from the first to the row's end
  bool vectors_;
};

// A thread's part of a row that every token needs: kept packed or, in rows that are no whole
// vectors, loaded whenever it is used. Threads that own nothing have zeros.
template <typename Element, bool kVectors>
class Row {
 public:
  __device__ __forceinline__ Row(const Channels<kVectors>& channels, const Element* row) {
    if (channels.owns(0)) {
      packed_ = channels.load_packed(row);
    }
  }
  __device__ __forceinline__ void get(const Channels<kVectors>&,
                                      const Element*,
                                      float (&x)[kPerThread]) const {
    unpack(packed_, x);
  }

 private:
  Packed8<Element> packed_ = {};
};
template <typename Element>
class Row<Element, false> {
 public:
  __device__ __forceinline__ Row(const Channels<false>&, const Element*) {}
  __device__ __forceinline__ void get(const Channels<false>& channels,
                                      const Element* row,
                                      float (&x)[kPerThread]) const {
    channels.load(row, x);
  }
};

// The number of channels that a warp owns.
__device__ __forceinline__ float warp_channels(int64_t n_embd, int warp) {
  const int64_t left = n_embd - static_cast<int64_t>(warp) * kPerWarp;
  return static_cast<float>(left < kPerWarp ? left : kPerWarp);
}

// The tokens of this block.
struct Tokens {
  int64_t begin, end;
};
__device__ __forceinline__ Tokens own_tokens(int64_t num_tokens) {
  const int64_t block = blockIdx.x, blocks = gridDim.x;
  return {block * num_tokens / blocks, (block + 1) * num_tokens / blocks};
}

// Two numbers of each warp for each of a step's tokens; steps take turns.
struct WarpPairs {
  float2 pairs[kMaxWarps];
};
template <int kTokens>
__device__ __forceinline__ WarpPairs* pairs_of_step(int step) {
  return static_cast<WarpPairs*>(shared_memory()) + step % 2 * kTokens;
}

// ---- The maths of a token, the same bits wherever it is called ----------------------------------

struct Statistics {
  float mean, rstd;
};

__device__ __forceinline__ float standardise(float s, Statistics statistics) {
  return (s - statistics.mean) * statistics.rstd;
}

// ---- Launching ----------------------------------------------------------------------------------

inline bool is_empty(const LayerNormShiftMixSizes& sizes) {
  return sizes.batch_size == 0 || sizes.seq_len == 0 || sizes.n_embd == 0;
}
inline bool is_valid(const LayerNormShiftMixSizes& sizes) {
  return sizes.num_mixes >= 0 && sizes.num_mixes <= kMaxMixes && sizes.n_embd <= kMaxChannels;
}

inline int threads_of(const LayerNormShiftMixSizes& sizes) {
  return static_cast<int>(ceil_div(sizes.n_embd, kPerWarp)) * kWarpSize;
}

// Threads that are resident on a multiprocessor with 128 registers each.
constexpr int kResidentThreads = 512;

// As many blocks as are resident at once, but no fewer than four tokens for each.
inline cudaError_t num_blocks(const LayerNormShiftMixSizes& sizes, int64_t* blocks) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t resident =
      int64_t{multiprocessors} * std::max(1, kResidentThreads / threads_of(sizes));
  *blocks = std::min(resident, ceil_div(sizes.batch_size * sizes.seq_len, 4));
  return error;
}

inline LaunchShape shape_of(const LayerNormShiftMixSizes& sizes, int64_t blocks, int tokens) {
  return {.grid = dim3(static_cast<unsigned>(blocks)),
          .block = dim3(static_cast<unsigned>(threads_of(sizes))),
          .shared_bytes = 2 * static_cast<size_t>(tokens) * sizeof(WarpPairs)};
}

inline bool are_vectors(const LayerNormShiftMixSizes& sizes,
                        std::initializer_list<const void*> pointers,
                        const auto& more) {
  uintptr_t bits = 0;
  for (const void* pointer : pointers) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  for (const void* pointer : more) {
    bits |= reinterpret_cast<uintptr_t>(pointer);
  }
  return sizes.n_embd % kPerThread == 0 && bits % 16 == 0;
}

}  // namespace rwkv::layer_norm_shift_mix
