// Recurrent states in weight files (model/state_file.h): which tensors they are. No Torch here.
//
//   ours      blocks.i.att.shift [C], blocks.i.ffn.shift [C], blocks.i.att.wkv of the version's
//             shape: [3, A] in rwkv4, [H, N keys, N values] in the others; metadata as below
//   RWKV-LM's blocks.i.att.time_state [H, N values, N keys]: the wkv state alone, with zeros for
//             the shifted rows. A .pth of these is what its state tuning saves and reads.
//   rwkv.cpp's
//             no weight file but its buffer, .bin: fp32 alone, without a header; of each layer
//             ffn.shift, att.shift and att.wkv as in ours, in rwkv7 [H, N values, N keys]. Its size
//             is all that it says of itself: RWKV-5 to -7 of the same sizes cannot be told apart.
//             Source: RWKV/rwkv.cpp rwkv.h, rwkv_graph.inc, rwkv_operators_wkv_v5.inc to _v7.inc.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/formats/weight_file.h"

namespace rwkv {

enum class StateKind { kNone, kOwn, kTimeState };

// Told by names alone; kNone if the file holds anything beside a state.
StateKind state_kind(const WeightFile& file);

// Metadata of ours: the version's name, and numbers; no head_size where a version has no heads.
inline constexpr const char* kStateVersion = "version";
inline constexpr const char* kStateLayers = "n_layer";
inline constexpr const char* kStateEmbd = "n_embd";
inline constexpr const char* kStateHeadSize = "head_size";

// Of a state of ours. Throws std::runtime_error naming the file if it does not say.
const std::string& version_of_state(const WeightFile& state);

// A state of ours as RWKV-LM's: views of the same bytes, under its names and in its index order.
// What it has no place for is left out. Throws std::runtime_error naming the file if its version
// has no heads.
std::vector<StoredTensor> as_time_state(const WeightFile& state);

// Whether the ending of `path`, .bin, says that it is a buffer of rwkv.cpp's.
bool is_state_buffer(const std::string& path);

// What a buffer's reader has to know.
struct StateSizes {
  std::string version;
  int64_t n_layer = 0;
  int64_t n_embd = 0;
  std::vector<int64_t> wkv_shape;  // as in ours
};
// Of a state of ours, told by its first layer. Throws std::runtime_error naming the file, and a
// tensor that is missing or not as its version has it.
StateSizes state_sizes(const WeightFile& state);

// A buffer as a state of ours: views of its numbers. Throws std::runtime_error naming both numbers
// of bytes if it has not the size of such a state.
WeightFile read_state_buffer(const std::string& path, const StateSizes& sizes);
// Writes a state of ours as a buffer, which appears whole or not at all. Throws std::runtime_error
// naming a tensor that is missing, not fp32 or of another shape, and if writing fails.
void write_state_buffer(const std::string& path,
                        std::span<const TensorToWrite> state,
                        const StateSizes& sizes);

}  // namespace rwkv
