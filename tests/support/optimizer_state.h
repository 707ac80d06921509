// What an optimizer holds, as tests compare it.
#pragma once

#include "model/weights.h"
#include "train/optimizer.h"

namespace rwkv::test {

// In the model's order and shapes.
inline NamedTensors master_weights(const Optimizer& optimizer) {
  CheckpointPieces state;
  optimizer.copy_state(state);
  NamedTensors weights;
  for (const TensorPiece& piece : state.weights) {
    weights.emplace_back(piece.name, piece.values.view(piece.shape));
  }
  return weights;
}

}  // namespace rwkv::test
