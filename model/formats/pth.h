// PyTorch's .pth files, read and written without Python.
//
// Zip container (torch.save since 1.6): a zip with one top folder, all entries stored, never
// compressed: data.pkl (a pickle of the object), data/<key> (the raw bytes of one storage each),
// version ("3\n"), byteorder ("little"). Sizes come from the central directory; zip64 beyond 4 GB.
// Legacy container: five pickles in a row (magic number, protocol 1001, system facts, the object,
// storage keys), then for each key i64 numel and the raw bytes.
//
// The pickle is read by an interpreter that knows only what a state dict needs: the opcodes of
// protocols 2 to 5 for numbers, strings, tuples, lists, dicts and references, and these globals:
//   collections.OrderedDict, torch._utils._rebuild_tensor_v2, torch._utils._rebuild_tensor,
//   torch._utils._rebuild_parameter, torch.*Storage, torch.Size, torch dtypes
// It builds descriptions and calls nothing. Any other opcode or global is refused by its name.
//
// A state dict may be the root or sit under a key of it: the one dict that holds tensors, and of
// several the one named "state_dict", "model_state_dict", "model", "module" or "weights"; values
// that are not tensors beside tensors are passed over, except the marks of ChatRWKV-converted files
// (_strategy, _version), which are refused: their matrices are rescaled. Prefixes common to all
// names ("_forward_module.", "module.", "model.") are taken off. Storages may be shared and strides
// any. Source: PyTorch torch/serialization.py, caffe2/serialize/inline_container.cc.
#pragma once

#include <span>
#include <string>

#include "model/formats/weight_file.h"

namespace rwkv {

// True if the first bytes are those of a zip file or of the legacy container.
bool is_pth(std::span<const std::byte> file);
// Throws std::runtime_error naming the path, what was found, what was expected: a cut file, entries
// outside the file, a compressed entry, a big-endian file, a forbidden global or opcode, a tensor
// that reaches outside its storage, no tensors at all, one name twice.
// The cost of a hostile file is bounded: a pickle may have 64 MiB and 2^20 values, a file 2^16
// tensors, a tensor 8 dimensions, a name 1024 bytes, and all tensors together may be 4 times the
// file, or 256 times up to 128 MiB (stride 0 and shared storages let them be more than it). The
// checksum of data.pkl is compared if there is one (PyTorch can leave it out); those of the tensors
// are not, for that would read all of them.
WeightFile read_pth(const std::string& path);
// Compares the checksums of all tensors' bytes, for whoever reads them all anyway. Only the zip
// container has some: a file of another format, or one without checksums, passes. Throws
// std::runtime_error naming the path and the storage that is damaged.
void verify_checksums(const WeightFile& file);
// Writes the zip container: an OrderedDict of tensors on the CPU, one storage each, data aligned to
// 64 bytes (torch.load(mmap=True) wants it), zip64 where needed. torch.load(weights_only=True,
// mmap=True) loads it. Throws std::invalid_argument for a name that occurs twice or data that does
// not fit its shape; std::runtime_error if writing fails.
void write_pth(const std::string& path, std::span<const TensorToWrite> tensors);

}  // namespace rwkv
