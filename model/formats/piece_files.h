// Tensors in the files of several processes: each of them writes what it holds, wherever its share
// begins and ends, and any number of processes can read it back.
//   STEM.00000-of-00003.safetensors, STEM.00001-of-00003.safetensors, ...
//     a tensor that is whole in a file lies there under its name, with its shape;
//     elements [begin, end) of a flattened one are a vector called "NAME[begin:end]", and the
//     file's metadata "rookery.shapes", a JSON object, has the whole shape at NAME.
//   STEM.safetensors, of one process: whole tensors, as in anybody's file.
// The pieces of a tensor meet without gap or overlap. All files have the same other metadata.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/formats/safetensors.h"
#include "model/formats/weight_file.h"

namespace rwkv {

// Elements [begin, end) of a tensor of this shape, flattened. An empty piece is not written.
struct PieceToWrite {
  std::string name;
  WeightDtype dtype = WeightDtype::kF32;
  std::vector<int64_t> shape;
  int64_t begin = 0;
  int64_t end = 0;
  std::span<const std::byte> data;
};

// One of several processes, counted from 0.
struct ProcessPlace {
  int64_t rank = 0;
  int64_t num_processes = 1;
};

// "model.00000-of-00002.safetensors"; "model.safetensors" of a single process.
std::string piece_file_name(std::string_view stem, ProcessPlace place);
// Writes the file of one process. Throws std::invalid_argument for a piece that does not lie in its
// tensor, and what write_safetensors throws.
WrittenFile write_pieces(const std::string& path,
                         std::span<const PieceToWrite> pieces,
                         const std::map<std::string, std::string>& metadata);

// Whether a folder holds such files of more than one process.
bool has_piece_files(const std::string& folder, std::string_view stem);

// The files STEM of a folder, opened for reading: all elements of every tensor are there.
class PieceFiles {
 public:
  struct Piece {
    int64_t begin = 0;
    int64_t end = 0;
    const StoredTensor* stored = nullptr;
    const WeightFile* file = nullptr;
  };
  struct Tensor {
    std::string name;
    WeightDtype dtype = WeightDtype::kF32;
    std::vector<int64_t> shape;
    std::vector<Piece> pieces;  // in the order of their elements
  };

  // Throws std::runtime_error naming file, tensor and elements if a file is missing or damaged, if
  // pieces overlap or leave a gap, or if they disagree in shape or type.
  PieceFiles(const std::string& folder, const std::string& stem);

  // The file, or a pattern for all of them, as an error text names them.
  const std::string& path() const { return path_; }
  // In the order of the files.
  const std::vector<Tensor>& tensors() const { return tensors_; }
  // Null if there is none of that name.
  const Tensor* find(std::string_view name) const;
  // Copies elements [begin, end) to `out`. Throws std::invalid_argument unless they lie in the
  // tensor and `out` has their size.
  void read(const Tensor& tensor, int64_t begin, int64_t end, std::span<std::byte> out) const;

  // All tensors whole, as of one file. Those that were cut are put together in memory; the others
  // stay where they are.
  WeightFile joined() const;

 private:
  void open(const std::string& folder, const std::string& stem);
  void add_tensors(const WeightFile& file);
  void check_pieces(Tensor& tensor) const;

  std::string folder_;
  std::string path_;
  std::vector<std::shared_ptr<const WeightFile>> files_;
  std::vector<Tensor> tensors_;
  std::map<std::string, size_t, std::less<>> places_;  // of names in tensors_
};

}  // namespace rwkv
