#include "model/formats/piece_files.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include <nlohmann/json.hpp>

#include "data/json_text.h"
#include "model/formats/checks.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr const char* kShapesKey = "rookery.shapes";
constexpr std::string_view kEnding = ".safetensors";
constexpr size_t kDigits = 5;
constexpr const char* kLost =
    "was a file left out when the checkpoint was copied? Copy it again, or delete it";

std::string five_digits(int64_t number) {
  const std::string digits = std::to_string(number);
  return std::string(kDigits - std::min(kDigits, digits.size()), '0') + digits;
}

std::optional<int64_t> parse_number(std::string_view text) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  const bool is_whole = error == std::errc() && end == text.data() + text.size();
  return is_whole && number >= 0 ? std::optional(number) : std::nullopt;
}

// The place that a file's name tells; nothing if it is no file of several processes.
std::optional<ProcessPlace> place_in(std::string_view file_name, std::string_view stem) {
  constexpr std::string_view kOf = "-of-";
  if (file_name.size() != stem.size() + 1 + kDigits + kOf.size() + kDigits + kEnding.size()) {
    return std::nullopt;
  }
  const auto rank = parse_number(file_name.substr(stem.size() + 1, kDigits));
  const auto count =
      parse_number(file_name.substr(stem.size() + 1 + kDigits + kOf.size(), kDigits));
  if (!rank || !count) {
    return std::nullopt;
  }
  const ProcessPlace place{.rank = *rank, .num_processes = *count};
  return file_name == piece_file_name(stem, place) ? std::optional(place) : std::nullopt;
}

struct PieceName {
  std::string tensor;
  int64_t begin = 0;
  int64_t end = 0;
};

std::string range_text(int64_t begin, int64_t end) {
  return "[" + std::to_string(begin) + ":" + std::to_string(end) + "]";
}

// Nothing if it is the name of a whole tensor.
std::optional<PieceName> parse_piece_name(std::string_view name) {
  const size_t bracket = name.rfind('[');
  if (bracket == name.npos || !name.ends_with("]")) {
    return std::nullopt;
  }
  const std::string_view range = name.substr(bracket + 1, name.size() - bracket - 2);
  const size_t colon = range.find(':');
  if (colon == range.npos) {
    return std::nullopt;
  }
  const auto begin = parse_number(range.substr(0, colon));
  const auto end = parse_number(range.substr(colon + 1));
  if (!begin || !end) {
    return std::nullopt;
  }
  return PieceName{.tensor = std::string(name.substr(0, bracket)), .begin = *begin, .end = *end};
}

using Shapes = std::map<std::string, std::vector<int64_t>, std::less<>>;

Shapes shapes_in(const WeightFile& file) {
  const auto found = file.metadata.find(kShapesKey);
  if (found == file.metadata.end()) {
    return {};
  }
  const std::string where = file.path + " (" + kShapesKey + ")";
  const nlohmann::json json = parse_json(found->second, where, "expected the shapes of tensors");
  try {
    return json.get<Shapes>();
  } catch (const nlohmann::json::exception&) {
    throw std::runtime_error(where + ": is " + shown_json(json) +
                             ", expected {name: [sizes]}; the file is damaged");
  }
}

int64_t num_elements(const PieceFiles::Tensor& tensor) {
  return checked_num_elements(tensor.shape, size_of(tensor.dtype));
}

}  // namespace

std::string piece_file_name(std::string_view stem, ProcessPlace place) {
  std::string name(stem);
  if (place.num_processes > 1) {
    name += "." + five_digits(place.rank) + "-of-" + five_digits(place.num_processes);
  }
  return name.append(kEnding);
}

WrittenFile write_pieces(const std::string& path,
                         std::span<const PieceToWrite> pieces,
                         const std::map<std::string, std::string>& metadata) {
  std::vector<TensorToWrite> tensors;
  nlohmann::json shapes = nlohmann::json::object();
  for (const PieceToWrite& piece : pieces) {
    const int64_t whole = checked_num_elements(piece.shape, size_of(piece.dtype));
    if (piece.begin < 0 || piece.begin > piece.end || piece.end > whole) {
      throw std::invalid_argument(path + ": " + piece.name + " is " + shape_text(piece.shape) +
                                  " and has no elements " + range_text(piece.begin, piece.end));
    }
    if (piece.begin == 0 && piece.end == whole) {
      tensors.push_back(
          {.name = piece.name, .dtype = piece.dtype, .shape = piece.shape, .data = piece.data});
    } else if (piece.begin < piece.end) {
      shapes[piece.name] = piece.shape;
      tensors.push_back({.name = piece.name + range_text(piece.begin, piece.end),
                         .dtype = piece.dtype,
                         .shape = {piece.end - piece.begin},
                         .data = piece.data});
    }
  }
  auto with_shapes = metadata;
  if (!shapes.empty()) {
    with_shapes.emplace(kShapesKey, shapes.dump());
  }
  return write_safetensors(path, tensors, with_shapes);
}

bool has_piece_files(const std::string& folder, std::string_view stem) {
  return fs::is_directory(folder) &&
         std::ranges::any_of(fs::directory_iterator(folder), [&](const fs::directory_entry& entry) {
           return place_in(entry.path().filename().string(), stem).has_value();
         });
}

PieceFiles::PieceFiles(const std::string& folder, const std::string& stem) : folder_(folder) {
  open(folder, stem);
  for (const auto& file : files_) {
    add_tensors(*file);
  }
  for (Tensor& tensor : tensors_) {
    check_pieces(tensor);
  }
}

void PieceFiles::open(const std::string& folder, const std::string& stem) {
  const auto read = [&](ProcessPlace place) {
    const std::string path = (fs::path(folder) / piece_file_name(stem, place)).string();
    files_.push_back(std::make_shared<const WeightFile>(read_safetensors(path)));
  };
  std::set<int64_t> counts;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (const auto place = place_in(entry.path().filename().string(), stem)) {
      counts.insert(place->num_processes);
    }
  }
  if (counts.size() > 1) {
    throw std::runtime_error(folder + ": holds files " + stem + " of " +
                             std::to_string(*counts.begin()) + " and of " +
                             std::to_string(*counts.rbegin()) +
                             " processes, expected those of one save; were two checkpoints copied "
                             "into one folder?");
  }
  if (counts.empty()) {
    read({});
    path_ = files_.front()->path;
    return;
  }
  const int64_t count = *counts.begin();
  path_ =
      (fs::path(folder) / (stem + ".*-of-" + five_digits(count) + std::string(kEnding))).string();
  for (int64_t rank = 0; rank < count; ++rank) {
    const std::string name = piece_file_name(stem, {.rank = rank, .num_processes = count});
    if (!fs::exists(fs::path(folder) / name)) {
      throw std::runtime_error((fs::path(folder) / name).string() + ": is missing, expected " +
                               std::to_string(count) + " files " + stem + ", one a process; " +
                               kLost);
    }
    read({.rank = rank, .num_processes = count});
  }
}

void PieceFiles::add_tensors(const WeightFile& file) {
  const Shapes shapes = shapes_in(file);
  for (const StoredTensor& stored : file.tensors) {
    // A file of one process holds whole tensors, whatever their names.
    const auto piece = files_.size() == 1 ? std::nullopt : parse_piece_name(stored.name);
    const std::string& name = piece ? piece->tensor : stored.name;
    const std::string where = file.path + ": " + in_quotes(stored.name);
    std::vector<int64_t> shape = stored.shape;
    if (piece) {
      const auto found = shapes.find(name);
      if (found == shapes.end() ||
          checked_num_elements(found->second, size_of(stored.dtype)) < piece->end) {
        throw std::runtime_error(
            where + " is a piece of a tensor that " +
            (found == shapes.end() ? "has no shape" : "is " + shape_text(found->second)) + " in " +
            kShapesKey + "; the file is damaged");
      }
      if (stored.shape != std::vector<int64_t>{piece->end - piece->begin}) {
        throw std::runtime_error(where + " is " + shape_text(stored.shape) + ", expected [" +
                                 std::to_string(piece->end - piece->begin) +
                                 "] by its name; the file is damaged");
      }
      shape = found->second;
    }
    const auto [place, is_new] = places_.emplace(name, tensors_.size());
    if (is_new) {
      tensors_.push_back({.name = name, .dtype = stored.dtype, .shape = shape, .pieces = {}});
    }
    Tensor& tensor = tensors_[place->second];
    if (tensor.dtype != stored.dtype || tensor.shape != shape) {
      throw std::runtime_error(where + " is of " + std::string(name_of(stored.dtype)) + " " +
                               shape_text(shape) + ", but " + tensor.pieces.front().file->path +
                               " has " + std::string(name_of(tensor.dtype)) + " " +
                               shape_text(tensor.shape) + "; are the files of one checkpoint?");
    }
    tensor.pieces.push_back({.begin = piece ? piece->begin : 0,
                             .end = piece ? piece->end : num_elements(tensor),
                             .stored = &stored,
                             .file = &file});
  }
}

void PieceFiles::check_pieces(Tensor& tensor) const {
  std::ranges::sort(
      tensor.pieces, {}, [](const Piece& piece) { return std::pair(piece.begin, piece.end); });
  int64_t expected = 0;
  const auto refuse_gap = [&](int64_t end) {
    if (expected < end) {
      throw std::runtime_error(path_ + ": elements " + range_text(expected, end) + " of " +
                               tensor.name + " " + shape_text(tensor.shape) +
                               " are in none of the files; " + kLost);
    }
  };
  for (const Piece& piece : tensor.pieces) {
    refuse_gap(piece.begin);
    if (piece.begin < expected) {
      throw std::runtime_error(piece.file->path + ": elements " +
                               range_text(piece.begin, piece.end) + " of " + tensor.name +
                               " are there a second time, up to " + std::to_string(expected) +
                               " they are in another piece; are the files of one checkpoint?");
    }
    expected = piece.end;
  }
  refuse_gap(num_elements(tensor));
}

const PieceFiles::Tensor* PieceFiles::find(std::string_view name) const {
  const auto found = places_.find(name);
  return found == places_.end() ? nullptr : &tensors_[found->second];
}

void PieceFiles::read(const Tensor& tensor,
                      int64_t begin,
                      int64_t end,
                      std::span<std::byte> out) const {
  const auto bytes_each = static_cast<size_t>(size_of(tensor.dtype));
  if (begin < 0 || begin > end || end > num_elements(tensor) ||
      out.size() != static_cast<size_t>(end - begin) * bytes_each) {
    throw std::invalid_argument(path_ + ": elements " + range_text(begin, end) + " of " +
                                tensor.name + " " + shape_text(tensor.shape) + " read to " +
                                std::to_string(out.size()) + " bytes");
  }
  for (const Piece& piece : tensor.pieces) {
    const int64_t from = std::max(begin, piece.begin);
    const int64_t to = std::min(end, piece.end);
    if (from < to) {
      // safetensors' tensors are contiguous, and their storage is theirs alone.
      std::memcpy(
          out.data() + static_cast<size_t>(from - begin) * bytes_each,
          piece.stored->storage.data() + static_cast<size_t>(from - piece.begin) * bytes_each,
          static_cast<size_t>(to - from) * bytes_each);
    }
  }
}

WeightFile PieceFiles::joined() const {
  if (files_.size() == 1) {
    return *files_.front();
  }
  WeightFile file{.path = folder_,
                  .format = "safetensors, " + std::to_string(files_.size()) + " files",
                  .tensors = {},
                  .metadata = files_.front()->metadata,
                  .mapping = nullptr,
                  .parts = {files_.begin(), files_.end()}};
  file.metadata.erase(kShapesKey);
  for (const Tensor& tensor : tensors_) {
    std::span<const std::byte> storage = tensor.pieces.front().stored->storage;
    if (tensor.pieces.size() > 1) {
      const auto memory = std::make_shared<std::vector<std::byte>>(
          static_cast<size_t>(num_elements(tensor) * size_of(tensor.dtype)));
      read(tensor, 0, num_elements(tensor), *memory);
      storage = *memory;
      file.parts.push_back(memory);
    }
    file.tensors.push_back({.name = tensor.name,
                            .dtype = tensor.dtype,
                            .shape = tensor.shape,
                            .strides = contiguous_strides(tensor.shape),
                            .storage = storage,
                            .offset = 0});
  }
  return file;
}

}  // namespace rwkv
