// Recurrent states in files: of one sequence, to go on from in another program or on another day.
//
// Ours are .safetensors, exact to the bit: what was read before a state was saved need not be read
// again. RWKV-LM's time_state, from state tuning, is read from any weight file; rwkv.cpp's buffer
// is read and written where a name ends in .bin. Names, shapes and metadata of all three:
// model/formats/state_tensors.h.
#pragma once

#include <string>

#include "model/rwkv_model.h"
#include "model/state.h"

namespace rwkv {

// The state in a file of any kind: one batch row, on the CPU, in the file's numbers. Throws
// std::runtime_error naming file and tensor, with what the model asks for, if it is a state of
// another version, of other sizes, or none; a buffer's size is all that can be wrong with it.
State load_state(const std::string& path, const RwkvModel& model);

// Writes a state of one batch row, which `model` made. Throws std::invalid_argument as
// check_state_path does; std::runtime_error if writing fails or a value is not finite.
void save_state(const std::string& path, const State& state, const RwkvModel& model);

// Throws std::invalid_argument unless save_state() can write under that name: so that a command can
// refuse before it works.
void check_state_path(const std::string& path);

}  // namespace rwkv
