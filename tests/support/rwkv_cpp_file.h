// The tiny models of rwkv.cpp, as tensors with RWKV-LM's names and shapes.
// Source: RWKV/rwkv.cpp docs/FILE_FORMAT.md, python/convert_pytorch_to_ggml.py.
#pragma once

#include <map>
#include <string>

#include <ATen/core/Tensor.h>

namespace rwkv::test {

// The tensors of an FP32 file as they lie there, in Torch's order of axes.
std::map<std::string, at::Tensor> load_rwkv_cpp(const std::string& path);

// Of RWKV-5: time_decay from the decay back to what RWKV-LM stores, in fp64, and time_first to
// time_faaaa; both [H, N], or [H, 1] where a head has one for all its channels.
void undo_rwkv5_transforms(std::map<std::string, at::Tensor>& tensors);
// Of RWKV-6: the low-rank factors back to [in, out].
void undo_rwkv6_transforms(std::map<std::string, at::Tensor>& tensors);

}  // namespace rwkv::test
