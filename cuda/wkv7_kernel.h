// Launchers of wkv7 and its backward (model/ops/wkv7.h has the equations).
//
// Plain kernels: T is walked token by token, with the state in registers; the latency of a step
// times T bounds them from below, whatever the batch. Rows of a state (values) never touch each
// other going forward, nor do its columns (keys) going back, so blocks take 32 of them each.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// Head sizes that there are kernels for.
constexpr bool is_wkv7_head_size(int64_t N) {
  return N == 32 || N == 64 || N == 128;
}

// A state is kept for backward before every kWkv7CarryLen-th token and, last, after the final one.
constexpr int64_t kWkv7CarryLen = 32;

struct Wkv7Sizes {
  int64_t B = 0, T = 0, H = 0, N = 0;
};
// Number of floats of the states that backward starts from: [B, H, ceil(T / 32) + 1, N, N].
int64_t wkv7_carries_floats(const Wkv7Sizes& sizes);

// All pointers are to device memory, contiguous, [B, T, H N] where nothing else is said; `Element`
// is float or __nv_bfloat16, arithmetic is fp32. Outputs may not overlap inputs. Pointers are
// aligned to 16 bytes.
template <typename Element>
struct Wkv7Inputs {
  Wkv7Sizes sizes;
  const Element *r, *w_raw, *k, *v, *a, *b;
  const float* w0;     // [H N]
  const bool* starts;  // [B, T]: a document starts at this token; null: nowhere
};

template <typename Element>
struct Wkv7Forward {
  Wkv7Inputs<Element> in;
  const float* state;  // [B, H, N, N]: first the key, then the value
  Element* y;
  float* state_out;  // as state, after the last token
  float* u;          // S a of each token, for backward; null: not wanted
  float* carries;    // wkv7_carries_floats(), for backward; null with u
};

template <typename Element>
struct Wkv7Backward {
  Wkv7Inputs<Element> in;
  const float* u;        // forward's
  const float* carries;  // forward's
  const Element* dy;
  const float* dstate_out;  // as state; null: zero
  Element *dr, *dw_raw, *dk, *dv, *da, *db;
  float* dw0;     // [B, H N]: to be summed over B
  float* dstate;  // as state
  float* du;      // scratch memory like u
};

// T must be 1 or more. Sums have a fixed order: two runs give the same bits. The error is the
// launch's, or cudaErrorInvalidValue for a head size that there is no kernel for.
template <typename Element>
cudaError_t launch_wkv7(const Wkv7Forward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv7_backward(const Wkv7Backward<Element>& args, cudaStream_t stream);

}  // namespace rwkv
