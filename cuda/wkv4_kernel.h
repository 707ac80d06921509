// Launchers of wkv4 and its backward (model/ops/wkv4.h has the equations).
//
// Three kernels give the same results up to rounding, and each is the others' second opinion:
//   kPlain        a thread walks T for one (batch row, channel); latency of a step sets its time
//   kChunkScan    the default: tiles of 128 tokens, in sub-chunks of 16 that threads share
//   kClusterScan  the same tiles, those of one sequence on the blocks of a cluster; sm_90 and up
// cuda/README.md has their plan and what was tried and dropped.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

enum class Wkv4Kernel { kPlain, kChunkScan, kClusterScan };

// A state is kept for backward before every kWkv4CarryLen-th token.
constexpr int64_t kWkv4CarryLen = 128;

// Number of floats that `carries` has. It is [B, ceil(T / 128) + 1, 3, A]: (a, b, p) before every
// 128th token and, last, after the final one, as a 2^p and b 2^p. Any forward kernel may be
// followed by any backward kernel.
int64_t wkv4_carries_floats(int64_t B, int64_t T, int64_t A);

// Number of floats of scratch memory that a launch needs on the current device; may be zero.
template <typename Element>
int64_t wkv4_scratch_floats(Wkv4Kernel kernel, int64_t B, int64_t T, int64_t A, bool backward);

// All pointers are to device memory, contiguous; `Element` is float or __nv_bfloat16, arithmetic is
// fp32. Outputs may not overlap inputs.
template <typename Element>
struct Wkv4Forward {
  int64_t B, T, A;
  const float* w_log;  // [A], each below 0
  const Element* k;    // [B, T, A]
  const Element* v;    // [B, T, A]
  const float* u;      // [A]
  const float* state;  // [B, 3, A]: a, b, p before the first token, as a e^p and b e^p
  const Element* r;    // [B, T, A]; null: no gate
  const bool* starts;  // [B, T]: a document starts at this token; null: nowhere
  Element* y;          // [B, T, A]: sigmoid(r) y where there is a gate
  float* state_out;    // [B, 3, A], after the last token
  float* carries;      // as above, for backward; null: not wanted
  float* scratch;      // wkv4_scratch_floats(..., false)
};

template <typename Element>
struct Wkv4Backward {
  int64_t B, T, A;
  const float* w_log;
  const Element* k;
  const Element* v;
  const float* u;
  const float* state;
  const Element* r;
  const bool* starts;
  const float* carries;     // forward's
  const Element* dy;        // [B, T, A]
  const float* dstate_out;  // [B, 3, A], the last row ignored; null: zero
  float* dw_log;            // [A]
  Element* dk;              // [B, T, A]
  Element* dv;              // [B, T, A]
  float* du;                // [A]
  float* dstate;            // [B, 3, A], the last row zero
  Element* dr;              // [B, T, A]; null without gate
  float* scratch;           // wkv4_scratch_floats(..., true)
};

// With T = 0 the state is handed on as it is, and so is its gradient. Sums have a fixed order: two
// runs give the same bits. kClusterScan gives cudaErrorNotSupported below compute capability 9.0
// and where rows are not whole 16-byte pieces: A no multiple of 8 in bf16 or of 4 in fp32, or an
// input not so aligned. Other errors are the launch's.
template <typename Element>
cudaError_t launch_wkv4(Wkv4Kernel kernel, const Wkv4Forward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv4_backward(Wkv4Kernel kernel,
                                 const Wkv4Backward<Element>& args,
                                 cudaStream_t stream);

}  // namespace rwkv
