// Launchers of layer_norm_shift_mix (model/ops/layer_norm_shift_mix.h, which has the equations),
// and of LayerNorm alone, which is the same without a shift.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace rwkv {

constexpr int kMaxMixes = 6;
// With eight channels a thread, as many as the largest block takes.
constexpr int64_t kMaxChannels = 8192;

// What all launchers share. All pointers are to device memory of contiguous tensors, `Element`
// float or __nv_bfloat16; arithmetic is fp32. Outputs may not overlap inputs. Sizes of zero launch
// nothing. The error is the launch's, or cudaErrorInvalidValue for more than kMaxMixes mixes or
// kMaxChannels channels. Rows are read and written 16 bytes at a time if n_embd is a multiple of 8
// and every pointer of 16 bytes, else element by element.
//
// num_mixes = 0 is LayerNorm alone: mixed[0] is n and dmixed[0] its gradient; carry, mix, last and
// their gradients are not touched and may be null.
struct LayerNormShiftMixSizes {
  int64_t batch_size = 0;
  int64_t seq_len = 0;
  int64_t n_embd = 0;
  int num_mixes = 0;
};

template <typename Element>
struct LayerNormShiftMixForward {
  LayerNormShiftMixSizes sizes;
  float eps = 0.0f;
  const Element* x = nullptr;       // [B, T, C]
  const Element* delta = nullptr;   // [B, T, C], or null for none
  const Element* weight = nullptr;  // [C]
  const Element* bias = nullptr;    // [C]
  const Element* carry = nullptr;   // [B, C]
  const Element* mix = nullptr;     // [J, C]
  Element* sum = nullptr;           // [B, T, C], x + delta; with a delta only
  Element* last = nullptr;          // [B, C]
  float* statistics = nullptr;      // [B, T, 2], mean and rstd
  Element* mixed[kMaxMixes] = {};   // J tensors [B, T, C]
};
template <typename Element>
cudaError_t launch_layer_norm_shift_mix(const LayerNormShiftMixForward<Element>& arguments,
                                        cudaStream_t stream);

// Shapes are those of the tensors that the gradients belong to.
template <typename Element>
struct LayerNormShiftMixBackward {
  LayerNormShiftMixSizes sizes;
  const Element* sum = nullptr;  // x, where there was no delta
  const float* statistics = nullptr;
  const Element* weight = nullptr;
  const Element* bias = nullptr;
  const Element* carry = nullptr;
  const Element* mix = nullptr;
  const Element* dsum = nullptr;   // null for zeros
  const Element* dlast = nullptr;  // null for zeros
  const Element* dmixed[kMaxMixes] = {};
  Element* ds = nullptr;  // gradient of x and of delta
  Element* dweight = nullptr;
  Element* dbias = nullptr;
  Element* dcarry = nullptr;
  Element* dmix = nullptr;
  float* scratch = nullptr;  // layer_norm_shift_mix_scratch_size() numbers
};
// Sums over tokens have an order that depends on the sizes and the device's number of
// multiprocessors alone: two runs give the same bits.
template <typename Element>
cudaError_t launch_layer_norm_shift_mix_backward(
    const LayerNormShiftMixBackward<Element>& arguments, cudaStream_t stream);

// Numbers of scratch that backward needs on the current device, a row of 2 + J vectors for each of
// its blocks: about 10 MB for C 768 and J 3 on 132 multiprocessors. Zero if the device cannot be
// asked; the launcher then returns its error.
int64_t layer_norm_shift_mix_scratch_size(const LayerNormShiftMixSizes& sizes);

}  // namespace rwkv
