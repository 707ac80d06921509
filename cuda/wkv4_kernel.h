// Launchers of wkv4 (model/ops/wkv4.h, which has the equations). Three kernels compute the same,
// each the others' second opinion:
//   kPlain        one thread per channel walks all of T                                     sm_80
//   up kChunkScan    tiles of tokens side by side, T cut into segments where that fills the GPU
//   sm_80 up kClusterScan  the same with a cluster of blocks along T and bulk copies sm_90 up
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

enum class Wkv4Kernel { kPlain, kChunkScan, kClusterScan };

// Tokens between two states that forward saves for backward, and the number of them in a row: those
// before tokens 0, 128, 256 ... and the one after the last token.
constexpr int64_t kWkv4CarryTokens = 128;
constexpr int64_t wkv4_num_carries(int64_t seq_len) {
  return (seq_len + kWkv4CarryTokens - 1) / kWkv4CarryTokens + 1;
}

// What forward and backward share. All pointers are to device memory of contiguous tensors;
// `Element` is float or __nv_bfloat16, arithmetic fp32. Outputs may not overlap inputs.
template <typename Element>
struct Wkv4Inputs {
  int64_t batch_size = 0;
  int64_t seq_len = 0;
  int64_t dim_att = 0;
  const float* w_log = nullptr;  // [A], each < 0
  const Element* k = nullptr;    // [B, T, A]
  const Element* v = nullptr;    // [B, T, A]
  const float* u = nullptr;      // [A]
  const float* state = nullptr;  // [B, 3, A]: a, b, p with A = a e^p, B = b e^p
  const Element* r = nullptr;    // [B, T, A], the gate; null for none
  const bool* starts = nullptr;  // [B, T], null for none: a document starts at this token, and
                                 // nothing before it, the given state included, reaches it
};

template <typename Element>
struct Wkv4Forward {
  Wkv4Inputs<Element> in;
  Element* y = nullptr;        // [B, T, A]; o where there is a gate
  float* state_out = nullptr;  // [B, 3, A]
  // [B, wkv4_num_carries(T), 3, A], as a, b, p with A = a 2^p, B = b 2^p: any kernel's forward may
  // be followed by any kernel's backward, which applies a start at the carry's own token. The last
  // is state_out with p in base 2: dstate_out is in units of that p, and each kernel has its own
  // way to choose p. Null: not wanted.
  float* carries = nullptr;
  float* scratch = nullptr;  // wkv4_scratch_floats(..., kForward) numbers
};

template <typename Element>
struct Wkv4Backward {
  Wkv4Inputs<Element> in;
  const float* carries = nullptr;     // of forward
  const Element* dy = nullptr;        // [B, T, A]
  const float* dstate_out = nullptr;  // [B, 3, A], null for zeros; that of p is ignored
  float* dw = nullptr;                // [A], of w_log
  Element* dk = nullptr;              // [B, T, A]
  Element* dv = nullptr;              // [B, T, A]
  float* du = nullptr;                // [A]
  float* dstate = nullptr;            // [B, 3, A]; that of p is zero
  Element* dr = nullptr;              // [B, T, A]; null without a gate
  float* scratch = nullptr;           // wkv4_scratch_floats(..., kBackward) numbers
};

enum class Wkv4Pass { kForward, kBackward };
// Numbers of scratch on the current device; may be 0.
int64_t wkv4_scratch_floats(
    Wkv4Kernel kernel, Wkv4Pass pass, int64_t batch_size, int64_t seq_len, int64_t dim_att);

// T = 0 returns the state as it is (backward: dstate = dstate_out, other gradients zero); B or A =
// 0 launches nothing. Sums over B and T have a fixed order: two runs give the same bits. Returns
// the launch's error; cudaErrorNotSupported if the kernel cannot do it: kClusterScan needs sm_90
// and rows of k, v, r and dy that are multiples of 16 bytes.
template <typename Element>
cudaError_t launch_wkv4(Wkv4Kernel kernel, const Wkv4Forward<Element>& pass, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv4_backward(Wkv4Kernel kernel,
                                 const Wkv4Backward<Element>& pass,
                                 cudaStream_t stream);

}  // namespace rwkv
