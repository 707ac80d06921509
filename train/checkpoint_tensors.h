// Tensors on their way into a checkpoint and out of it, cut wherever a process's share begins and
// ends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/formats/piece_files.h"

namespace rwkv {

// Elements [begin, end) of a tensor, flattened, on the CPU.
struct TensorPiece {
  std::string name;
  std::vector<int64_t> shape;  // of the whole tensor
  int64_t begin = 0;
  int64_t end = 0;
  at::Tensor values;  // [end - begin], fp32, contiguous
};

// What one process has of a run: masters under the parameters' names, moments as "m.<name>" and
// "v.<name>". The pieces of all processes together are all elements, each once.
struct CheckpointPieces {
  std::vector<TensorPiece> weights;
  std::vector<TensorPiece> moments;
};
// Of all values.
uint64_t bytes_of(const CheckpointPieces& pieces);
// The first tensor that has a value that is not finite; empty if all are.
std::string first_nonfinite(const std::vector<TensorPiece>& pieces);
// For a writer; `pieces` must stay alive.
std::vector<PieceToWrite> to_write(const std::vector<TensorPiece>& pieces);

// The weights, or the moments, of a checkpoint that any number of processes wrote.
class SavedTensors {
 public:
  // Throws as PieceFiles does.
  SavedTensors(const std::string& checkpoint, const std::string& stem) : files_(checkpoint, stem) {}

  // A copy of elements [begin, end) of the flattened tensor, on the CPU, of the type it was saved
  // in. Throws std::runtime_error naming the file and a tensor that is missing or of another shape.
  at::Tensor read(const std::string& name, at::IntArrayRef shape, int64_t begin, int64_t end) const;
  // All of it, in its shape.
  at::Tensor read(const std::string& name, at::IntArrayRef shape) const;

 private:
  PieceFiles files_;
};

struct CheckpointTensors {
  SavedTensors weights;
  SavedTensors moments;
};
CheckpointTensors open_checkpoint(const std::string& checkpoint);

}  // namespace rwkv
