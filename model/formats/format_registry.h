// The table from a weight format to its reader and writer.
#pragma once

#include <map>
#include <span>
#include <string>

#include "model/formats/weight_file.h"

namespace rwkv {

// Opens a file of any known format, told by its content and not its name, or a checkpoint directory
// (a folder that holds model.safetensors, or the files of several processes: piece_files.h).
// Throws std::runtime_error naming the path, what was found and what was expected.
WeightFile read_weights(const std::string& path);

// Writes tensors in the format that the ending of `path` names: .pth or .safetensors (.st). The
// file appears whole or not at all. `metadata` is kept by safetensors; .pth has no place for it.
// Throws std::invalid_argument for another ending; std::runtime_error if writing fails.
void write_weights(const std::string& path,
                   std::span<const TensorToWrite> tensors,
                   const std::map<std::string, std::string>& metadata);

// Throws std::invalid_argument, as write_weights would, if the ending is unknown: so that a command
// can refuse before it works.
void check_weights_path(const std::string& path);

}  // namespace rwkv
