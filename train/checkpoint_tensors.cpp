#include "train/checkpoint_tensors.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <stdexcept>

#include <ATen/ATen.h>

#include "model/weights.h"

namespace rwkv {

uint64_t bytes_of(const CheckpointPieces& pieces) {
  uint64_t bytes = 0;
  for (const auto* kind : {&pieces.weights, &pieces.moments}) {
    for (const TensorPiece& piece : *kind) {
      bytes += piece.values.nbytes();
    }
  }
  return bytes;
}

std::string first_nonfinite(const std::vector<TensorPiece>& pieces) {
  const auto is_finite = [](float value) { return std::isfinite(value); };
  for (const TensorPiece& piece : pieces) {
    const std::span values(piece.values.const_data_ptr<float>(),
                           static_cast<size_t>(piece.values.numel()));
    if (!std::ranges::all_of(values, is_finite)) {
      return piece.name;
    }
  }
  return "";
}

std::vector<PieceToWrite> to_write(const std::vector<TensorPiece>& pieces) {
  std::vector<PieceToWrite> result;
  for (const TensorPiece& piece : pieces) {
    const at::Tensor& values = piece.values;
    TORCH_CHECK(
        values.is_contiguous() && values.is_cpu() && values.numel() == piece.end - piece.begin,
        piece.name,
        "[",
        piece.begin,
        ":",
        piece.end,
        "] is ",
        values.sizes(),
        " on ",
        values.device(),
        ", expected its elements in a row on the CPU");
    result.push_back({.name = piece.name,
                      .dtype = to_weight_dtype(values.scalar_type()),
                      .shape = piece.shape,
                      .begin = piece.begin,
                      .end = piece.end,
                      .data = std::span(static_cast<const std::byte*>(values.const_data_ptr()),
                                        values.nbytes())});
  }
  return result;
}

at::Tensor SavedTensors::read(const std::string& name,
                              at::IntArrayRef shape,
                              int64_t begin,
                              int64_t end) const {
  const PieceFiles::Tensor* stored = files_.find(name);
  if (stored == nullptr) {
    throw std::runtime_error(files_.path() + ": " + name +
                             " is missing; the checkpoint is not of this model");
  }
  if (at::IntArrayRef(stored->shape) != shape) {
    throw std::runtime_error(c10::str(files_.path(),
                                      ": ",
                                      name,
                                      " is ",
                                      at::IntArrayRef(stored->shape),
                                      ", expected ",
                                      shape,
                                      "; the checkpoint is not of this model"));
  }
  at::Tensor values = at::empty({end - begin}, to_scalar_type(stored->dtype));
  files_.read(*stored,
              begin,
              end,
              std::span(static_cast<std::byte*>(values.mutable_data_ptr()), values.nbytes()));
  return values;
}

at::Tensor SavedTensors::read(const std::string& name, at::IntArrayRef shape) const {
  return read(name, shape, 0, c10::multiply_integers(shape)).view(shape);
}

CheckpointTensors open_checkpoint(const std::string& checkpoint) {
  return {.weights = {checkpoint, "model"}, .moments = {checkpoint, "optimizer"}};
}

}  // namespace rwkv
