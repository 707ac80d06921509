// Recurrent states in weight files (model/state_file.h): which tensors they are. No Torch here.
//
//   ours      blocks.i.att.shift [C], blocks.i.ffn.shift [C], blocks.i.att.wkv of the version's
//             shape: [3, A] in rwkv4, [H, N keys, N values] in the others; metadata as below
//   RWKV-LM's blocks.i.att.time_state [H, N values, N keys]: the wkv state alone, with zeros for
//             the shifted rows. A .pth of these is what its state tuning saves and reads.
#pragma once

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

// A state of ours as RWKV-LM's: views of the same bytes, under its names and in its index order.
// What it has no place for is left out. Throws std::runtime_error naming the file if its version
// has no heads.
std::vector<StoredTensor> as_time_state(const WeightFile& state);

}  // namespace rwkv
