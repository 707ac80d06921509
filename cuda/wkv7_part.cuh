// What wkv7's kernels have in common: how threads share a head's state, and a token's way through
// it.
//
// Launch shape: a block owns 32 lines of a head's state; a thread has 8 numbers of 2 of them in
// registers, and N / 8 neighbouring lanes add up their parts. With 4 lines a thread reads half as
// much, but a token's chain (the update, the sums, u for the next token) is longer, and it is what
// everything waits for. Tokens come through shared memory in blocks. Of a line's numbers a thread
// has four neighbours out of every N / 2, so that the lanes of a warp read neighbouring words.
//
// Lines are rows (values) where D or the state is walked in one pass with the sums over keys, and
// columns (keys) where sums over values are asked for.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/vector_io.cuh"
#include "cuda/wkv7_kernel.h"

namespace rwkv::wkv7 {

constexpr int kLines = 32;       // of a block
constexpr int kThreadLines = 2;  // that a thread has a part of
constexpr int kNumbers = 8;      // of that part
constexpr int kRowTokens = 32;   // of a block in shared memory, where lines are rows
// Of a multiprocessor, at least, where lines are rows: 168 registers each. With more nvcc reads so
// far ahead that it spills.
constexpr int kThreadsAtOnce = 384;

// log(w) = -e^{-1/2} gate; and the same for powers of two.
constexpr float kMostDecay = 0.60653066f;
constexpr float kMostDecayLog2 = 0.87503871f;

__device__ __forceinline__ float sigmoid(float x) {
  return fast_reciprocal(1.0f + fast_exp2(x * -1.44269504f));
}
__device__ __forceinline__ float decay_of(float gate) {
  return fast_exp2(gate * -kMostDecayLog2);
}

// Of its lines, a thread's parts.
using Part = float[kThreadLines][kNumbers];

// What a thread is in charge of.
template <int kSize>
struct Place {
  static constexpr int kParts = kSize / kNumbers;
  static constexpr int kBlocks = kSize / kLines;  // of a head
  static constexpr int kThreads = kLines / kThreadLines * kParts;
  static constexpr int kSharers = kParts / kThreadLines;  // lanes that end with the same line's sum

  __device__ explicit Place(const Wkv7Sizes& sizes)
      : part(static_cast<int>(threadIdx.x) % kParts),
        own(static_cast<int>(threadIdx.x) / kParts * kThreadLines),
        line(static_cast<int>(blockIdx.x) % kBlocks * kLines + own),
        number(static_cast<int64_t>(blockIdx.x) / kBlocks),
        row(number / sizes.H),
        n_embd(sizes.H * kSize),
        head_first(number % sizes.H * kSize),
        first(row * sizes.T * n_embd + head_first) {}

  int part;        // of the lines
  int own;         // the first line's place among the block's
  int line;        // and of the head's state
  int64_t number;  // of the head, over all batch rows
  int64_t row;     // of the batch
  int64_t n_embd;
  int64_t head_first;  // channel of the head
  int64_t first;       // element of the head's first channel in a tensor, of the row's first token
  __device__ __forceinline__ int first_line() const { return line - own; }
  // Which of the thread's lines own_line_sum() is of, and whether this lane is the one to store it.
  __device__ __forceinline__ int summed() const { return part / kSharers; }
  __device__ __forceinline__ bool stores() const { return part % kSharers == 0; }
};

// Neighbours, of a place that is aligned to them.
__device__ __forceinline__ void load(const float* from, float (&x)[4]) {
  const float4 packed = *reinterpret_cast<const float4*>(from);
  x[0] = packed.x, x[1] = packed.y, x[2] = packed.z, x[3] = packed.w;
}
__device__ __forceinline__ void load(const float* from, float (&x)[2]) {
  const float2 packed = *reinterpret_cast<const float2*>(from);
  x[0] = packed.x, x[1] = packed.y;
}
__device__ __forceinline__ void store(const float (&x)[4], float* to) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store(const float (&x)[2], float* to) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}

// Calls work(e, four) for the thread's numbers of a line, four neighbours at a time: e ... e + 3 of
// its own are four ... four + 3 of the line.
template <int kSize, typename Work>
__device__ __forceinline__ void for_own_fours(int part, const Work& work) {
#pragma unroll
  for (int e = 0; e < kNumbers; e += 4) {
    work(e, e * Place<kSize>::kParts + part * 4);
  }
}
template <int kCount>
__device__ __forceinline__ void fill(float value, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[i] = value;
  }
}
__device__ __forceinline__ void fill(float value, Part& m) {
#pragma unroll
  for (int line = 0; line < kThreadLines; ++line) {
    fill(value, m[line]);
  }
}

// Of a matrix [N, N] in memory, the lines as columns: m[line][e] is matrix[four + e][line].
template <int kSize>
__device__ __forceinline__ void load_columns(const float* matrix, const Place<kSize>& at, Part& m) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kThreadLines];
      load(matrix + (four + i) * kSize + at.line, x);
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        m[line][e + i] = x[line];
      }
    }
  });
}
template <int kSize>
__device__ __forceinline__ void store_columns(const Part& m,
                                              const Place<kSize>& at,
                                              float* matrix) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[kThreadLines];
#pragma unroll
      for (int line = 0; line < kThreadLines; ++line) {
        x[line] = m[line][e + i];
      }
      store(x, matrix + (four + i) * kSize + at.line);
    }
  });
}
// The lines as rows.
template <int kSize>
__device__ __forceinline__ void load_rows(const float* matrix, const Place<kSize>& at, Part& m) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      float x[4];
      load(matrix + (at.line + line) * kSize + four, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        m[line][e + i] = x[i];
      }
    }
  });
}
template <int kSize>
__device__ __forceinline__ void store_rows(const Part& m, const Place<kSize>& at, float* matrix) {
  for_own_fours<kSize>(at.part, [&](int e, int four) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      const float x[4] = {m[line][e], m[line][e + 1], m[line][e + 2], m[line][e + 3]};
      store(x, matrix + (at.line + line) * kSize + four);
    }
  });
}

// The sums of all parts of the thread's lines, the same bits in all lanes that have one.
template <int kParts>
__device__ __forceinline__ void sum_lines(float (&x)[kThreadLines]) {
#pragma unroll
  for (int distance = kParts / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
      x[line] += __shfl_xor_sync(kAllLanes, x[line], distance);
    }
  }
}
// Of one of the thread's lines only, Place::summed(): with each step a lane gives half of its lines
// away.
template <int kParts>
__device__ __forceinline__ float own_line_sum(float (&x)[kThreadLines], int part) {
  int distance = kParts / 2;
#pragma unroll
  for (int half = kThreadLines / 2; half > 0; half /= 2, distance /= 2) {
    const bool is_upper = (part & distance) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = is_upper ? x[i] : x[i + half];
      const float kept = is_upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
#pragma unroll
  for (; distance > 0; distance /= 2) {
    x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
  }
  return x[0];
}

// Calls work(place among the tokens, channel) for every eighth of kTokens x kChannels cells, shared
// among the threads: unrolled, so that all that a thread reads is under way at once.
template <int kThreads, int kTokens, int kChannels, typename Work>
__device__ __forceinline__ void for_eights(int tokens, const Work& work) {
  constexpr int kEights = kTokens * kChannels / 8;
#pragma unroll
  for (int first = 0; first < kEights; first += kThreads) {
    const int cell = (first + static_cast<int>(threadIdx.x)) * 8;
    if (cell < tokens * kChannels) {
      work(cell / kChannels, cell % kChannels);
    }
  }
}

// Eight neighbours into shared memory, as numbers.
template <typename Element>
__device__ __forceinline__ void copy8(const Element* from, float* to) {
  float x[8];
  load8(from, x);
  store8(to, x);
}
// The same of w_raw as gates, which decays come from.
template <typename Element>
__device__ __forceinline__ void load_gates(const float* w0,
                                           const Element* w_raw,
                                           float (&gate)[8]) {
  float bias[8];
  load8(w0, bias);
  load8(w_raw, gate);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    gate[i] = sigmoid(bias[i] + gate[i]);
  }
}
__device__ __forceinline__ void store_decays(const float (&gate)[8], float* to) {
  float w[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    w[i] = decay_of(gate[i]);
  }
  store8(to, w);
}
__device__ __forceinline__ void fill8(float value, float* to) {
  const float x[8] = {value, value, value, value, value, value, value, value};
  store8(to, x);
}

// Bit i: a document starts at token first + i. By whole warps; `starts` [T] may be null.
__device__ __forceinline__ uint32_t starts_from(const bool* starts, int64_t first, int64_t T) {
  const int64_t t = first + static_cast<int>(threadIdx.x) % kWarpSize;
  return __ballot_sync(kAllLanes, starts != nullptr && t < T && starts[t]);
}

__device__ __forceinline__ int smaller(int64_t x, int y) {
  return x < y ? static_cast<int>(x) : y;
}

// One token's way through the thread's lines: m = m decay + second second_keys + first first_keys;
// the thread's parts of the sums of m with both queries. `first` is the last to be known.
template <int kSize>
__device__ __forceinline__ void advance(Part& m,
                                        int part,
                                        const float* decay,
                                        const float (&first)[kThreadLines],
                                        const float* first_keys,
                                        const float (&second)[kThreadLines],
                                        const float* second_keys,
                                        const float* first_query,
                                        const float* second_query,
                                        float (&first_sums)[kThreadLines],
                                        float (&second_sums)[kThreadLines]) {
  fill(0.0f, first_sums);
  fill(0.0f, second_sums);
  for_own_fours<kSize>(part, [&](int e, int four) {
    float w[4], x[4], z[4], p[4], q[4];
    load(decay + four, w);
    load(first_keys + four, x);
    load(second_keys + four, z);
    load(first_query + four, p);
    load(second_query + four, q);
#pragma unroll
    for (int line = 0; line < kThreadLines; ++line) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& own = m[line][e + i];
        own = fmaf(first[line], x[i], fmaf(second[line], z[i], own * w[i]));
        first_sums[line] = fmaf(own, p[i], first_sums[line]);
        second_sums[line] = fmaf(own, q[i], second_sums[line]);
      }
    }
  });
}

// ---- Launching ----------------------------------------------------------------------------------

template <int kSize>
LaunchShape shape_of(const Wkv7Sizes& sizes, int shared_floats) {
  return {.grid = dim3(static_cast<unsigned>(sizes.B * sizes.H * Place<kSize>::kBlocks)),
          .block = dim3(Place<kSize>::kThreads),
          .shared_bytes = static_cast<size_t>(shared_floats) * sizeof(float)};
}

// launch(std::integral_constant<int, N>()), for the head sizes that there are kernels for.
template <typename Launch>
cudaError_t with_head_size(int64_t N, const Launch& launch) {
  switch (N) {
    case 32:
      return launch(std::integral_constant<int, 32>());
    case 64:
      return launch(std::integral_constant<int, 64>());
    case 128:
      return launch(std::integral_constant<int, 128>());
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace rwkv::wkv7
