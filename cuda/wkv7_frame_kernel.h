// Launchers of wkv7_inputs and wkv7_output (model/ops have the equations), which stand before and
// behind wkv7: one pass over their tensors each, a warp for a head of a token.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

// All pointers are to device memory, contiguous, [tokens, H N] where nothing else is said;
// `Element` is float or __nv_bfloat16, arithmetic is fp32. Outputs may not overlap inputs. Pointers
// to elements are aligned to four of them. Heads are those of is_wkv7_head_size().
struct Wkv7FrameSizes {
  int64_t tokens = 0, H = 0, N = 0;
};
// Number of floats of scratch memory that a backward launch needs.
int64_t wkv7_frame_scratch_floats(const Wkv7FrameSizes& sizes);

template <typename Element>
struct Wkv7InputsForward {
  Wkv7FrameSizes sizes;
  const Element *k, *a_raw, *v;
  const Element *v_raw, *v_first;  // null in the first layer
  const Element *k_k, *k_a;        // [H N]
  Element *k_out, *a, *b;
  Element* v_out;  // null in the first layer
};
template <typename Element>
struct Wkv7InputsBackward {
  Wkv7FrameSizes sizes;
  const Element *k, *a_raw;
  const Element *v, *v_raw, *v_first;  // null in the first layer
  const Element *k_k, *k_a;
  const Element *dk_out, *da, *db;
  const Element* dv_out;  // null in the first layer
  Element *dk, *da_raw;
  Element *dv, *dv_raw, *dv_first;  // null in the first layer
  Element *dk_k, *dk_a;             // [H N]
  float* scratch;
};

template <typename Element>
struct Wkv7OutputForward {
  Wkv7FrameSizes sizes;
  const Element *y, *r, *k, *v, *g;
  const Element *r_k, *weight, *bias;  // [H N]
  float eps;
  Element* out;
};
template <typename Element>
struct Wkv7OutputBackward {
  Wkv7FrameSizes sizes;
  const Element *y, *r, *k, *v, *g;
  const Element *r_k, *weight, *bias;
  float eps;
  const Element* dout;
  Element *dy, *dr, *dk, *dv, *dg;
  Element *dr_k, *dweight, *dbias;  // [H N]
  float* scratch;
};

// Sums have a fixed order: two runs give the same bits. The error is the launch's, or
// cudaErrorInvalidValue for a head size that there is no kernel for.
template <typename Element>
cudaError_t launch_wkv7_inputs(const Wkv7InputsForward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv7_inputs_backward(const Wkv7InputsBackward<Element>& args,
                                        cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv7_output(const Wkv7OutputForward<Element>& args, cudaStream_t stream);
template <typename Element>
cudaError_t launch_wkv7_output_backward(const Wkv7OutputBackward<Element>& args,
                                        cudaStream_t stream);

}  // namespace rwkv
