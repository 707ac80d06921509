// What is in a file or folder that this program reads: for `rookery inspect`.
#pragma once

#include <string>

namespace rwkv {

// Looks at
//   a weight file (.pth, .safetensors), a checkpoint's folder, a run's folder (its newest
//   checkpoint) a corpus (PREFIX, PREFIX.bin or PREFIX.idx) a tokenizer's file, or a spec such as
//   "world" or "neox:FILE" (data/tokenizer_registry.h) a TensorBoard event file
// told by its content, and describes it: as an aligned table of what is most asked for, then the
// tensors; or as JSON with all of it. Reads every element of every tensor.
// Throws std::runtime_error naming the file for one that is broken or of no known kind.
std::string inspect_as_text(const std::string& path);
std::string inspect_as_json(const std::string& path);

}  // namespace rwkv
