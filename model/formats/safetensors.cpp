#include "model/formats/safetensors.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <future>
#include <optional>
#include <stdexcept>
#include <utility>

#include <nlohmann/json.hpp>

#include "data/atomic_file.h"
#include "data/content_hash.h"
#include "model/formats/checks.h"

namespace rwkv {
namespace {

using Json = nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
// Of this size and more a tensor is hashed by one thread while another writes it.
constexpr size_t kLargeBytes = size_t{1} << 20;
constexpr std::string_view kMetadataKey = "__metadata__";
// As kMaxTensors: an entry takes more memory than it has bytes in the file.
constexpr size_t kMaxMetadata = size_t{1} << 16;

constexpr std::array<std::pair<std::string_view, WeightDtype>, 10> kDtypeNames = {{
    {"F64", WeightDtype::kF64},
    {"F32", WeightDtype::kF32},
    {"F16", WeightDtype::kF16},
    {"BF16", WeightDtype::kBf16},
    {"I64", WeightDtype::kI64},
    {"I32", WeightDtype::kI32},
    {"I16", WeightDtype::kI16},
    {"I8", WeightDtype::kI8},
    {"U8", WeightDtype::kU8},
    {"BOOL", WeightDtype::kBool},
}};

std::string_view json_name_of(WeightDtype dtype) {
  for (const auto& [name, value] : kDtypeNames) {
    if (value == dtype) {
      return name;
    }
  }
  throw std::logic_error("a weight dtype without a row in kDtypeNames");
}

struct HeaderEntry {
  std::string name;
  std::optional<WeightDtype> dtype;
  std::optional<std::vector<int64_t>> shape;
  std::optional<std::vector<int64_t>> data_offsets;
};

// Takes the header's JSON event by event and keeps what it describes: no tree is built, so a
// hostile header costs what its tensors cost, and a key that occurs twice is seen.
class HeaderReader : public Json::json_sax_t {
 public:
  explicit HeaderReader(const std::string& where) : where_(where) {}

  std::vector<HeaderEntry> entries;
  std::map<std::string, std::string> metadata;

  bool start_object(size_t) override {
    if (place_ == Place::kStart) {
      place_ = Place::kRoot;
    } else if (place_ == Place::kRoot && key_ == kMetadataKey) {
      place_ = Place::kMetadata;
    } else if (place_ == Place::kRoot) {
      place_ = Place::kTensor;
      require_at_most(kMaxTensors, entries.size() + 1, "tensors");
      entries.push_back({.name = key_, .dtype = {}, .shape = {}, .data_offsets = {}});
    } else {
      refuse("an object");
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kTensor) {
      const HeaderEntry& entry = entries.back();
      if (!entry.dtype || !entry.shape || !entry.data_offsets) {
        throw std::runtime_error(where_ + ": the header entry " + in_quotes(entry.name) +
                                 " lacks dtype, shape or data_offsets; the file is damaged");
      }
    }
    place_ = place_ == Place::kRoot ? Place::kStart : Place::kRoot;
    return true;
  }

  bool key(string_t& text) override {
    if (place_ == Place::kRoot && text == kMetadataKey && std::exchange(has_metadata_, true)) {
      throw std::runtime_error(where_ + ": the header holds " + in_quotes(kMetadataKey) +
                               " twice; the file is damaged");
    }
    if (place_ == Place::kMetadata && metadata.contains(text)) {
      throw std::runtime_error(where_ + ": the metadata hold " + in_quotes(text) +
                               " twice; the file is damaged");
    }
    key_ = text;
    return true;
  }

  bool string(string_t& text) override {
    if (place_ == Place::kMetadata) {
      require_at_most(kMaxMetadata, metadata.size() + 1, "metadata entries");
      metadata[key_] = text;
    } else if (place_ == Place::kTensor && key_ == "dtype" && !entries.back().dtype) {
      const auto row = std::find_if(
          kDtypeNames.begin(), kDtypeNames.end(), [&](const auto& r) { return r.first == text; });
      if (row == kDtypeNames.end()) {
        throw std::runtime_error(where_ + ": " + in_quotes(entries.back().name) + " has dtype " +
                                 in_quotes(text) +
                                 ", expected F64, F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL");
      }
      entries.back().dtype = row->second;
    } else {
      refuse("the string " + in_quotes(text));
    }
    return true;
  }

  bool start_array(size_t) override {
    std::optional<std::vector<int64_t>>* list = nullptr;
    if (place_ == Place::kTensor && key_ == "shape") {
      list = &entries.back().shape;
    } else if (place_ == Place::kTensor && key_ == "data_offsets") {
      list = &entries.back().data_offsets;
    }
    if (list == nullptr || list->has_value()) {
      refuse("an array");
    }
    list->emplace();
    place_ = Place::kArray;
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kArray || value > static_cast<uint64_t>(INT64_MAX)) {
      refuse("the number " + std::to_string(value));
    }
    HeaderEntry& entry = entries.back();
    std::vector<int64_t>& list = *(key_ == "shape" ? entry.shape : entry.data_offsets);
    require_at_most(kMaxRank, list.size() + 1, "numbers in one list");
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool null() override { refuse("null"); }
  bool boolean(bool) override { refuse("true or false"); }
  bool number_integer(number_integer_t value) override {
    refuse("the number " + std::to_string(value));
  }
  bool number_float(number_float_t, const string_t& text) override {
    refuse("the number " + text.substr(0, 40));
  }
  bool binary(binary_t&) override { refuse("binary data"); }
  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    throw std::runtime_error(where_ + ": the header is broken JSON at byte " +
                             std::to_string(kLengthBytes + position) +
                             " of the file; the file is damaged");
  }

 private:
  enum class Place { kStart, kRoot, kTensor, kArray, kMetadata };

  [[noreturn]] void refuse(const std::string& what) {
    throw std::runtime_error(
        where_ + ": the header has " + what + (key_.empty() ? "" : " at " + in_quotes(key_)) +
        ", expected {name: {\"dtype\": string, \"shape\": [sizes], \"data_offsets\": [begin, end]},"
        " \"__metadata__\": {string: string}}; the file is damaged");
  }

  void require_at_most(size_t most, size_t count, const char* what) const {
    if (count > most) {
      throw std::runtime_error(where_ + ": the header has more than " + std::to_string(most) + " " +
                               what + (key_.empty() ? "" : " at " + in_quotes(key_)) +
                               ", far more than a model has; the file is damaged");
    }
  }

  const std::string& where_;
  Place place_ = Place::kStart;
  std::string key_;
  bool has_metadata_ = false;
};

StoredTensor to_tensor(const HeaderEntry& entry,
                       std::span<const std::byte> data,
                       const std::string& where) {
  const int64_t bytes_each = size_of(*entry.dtype);
  const int64_t n = checked_num_elements(*entry.shape, bytes_each);
  const std::string what =
      where + ": " + in_quotes(entry.name) + " has data_offsets " + shape_text(*entry.data_offsets);
  if (entry.data_offsets->size() != 2) {
    throw std::runtime_error(what + ", expected [begin, end]; the file is damaged");
  }
  const int64_t begin = entry.data_offsets->front();
  const int64_t end = entry.data_offsets->back();
  if (begin > end || static_cast<uint64_t>(end) > data.size()) {
    throw std::runtime_error(what + ", but the file holds " + std::to_string(data.size()) +
                             " bytes of data; the copy looks cut short");
  }
  if (n < 0 || n * bytes_each != end - begin) {
    throw std::runtime_error(what + ", which do not fit shape " + shape_text(*entry.shape) +
                             " and dtype " + std::string(name_of(*entry.dtype)) +
                             "; the file is damaged");
  }
  return {.name = entry.name,
          .dtype = *entry.dtype,
          .shape = *entry.shape,
          .strides = contiguous_strides(*entry.shape),
          .storage = data.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin)),
          .offset = 0};
}

// The tensors, already in the order of their offsets, must cover the data: a hole could hide
// anything, and overlap would let one file claim any size.
void check_coverage(std::span<const StoredTensor> tensors,
                    std::span<const std::byte> data,
                    const std::string& where) {
  const std::byte* expected = data.data();
  for (const StoredTensor& tensor : tensors) {
    if (tensor.storage.data() != expected) {
      throw std::runtime_error(
          where + ": " + in_quotes(tensor.name) + " begins at byte " +
          std::to_string(tensor.storage.data() - data.data()) + " of the data, expected " +
          std::to_string(expected - data.data()) +
          ", where the tensor before it ends: tensors overlap or leave a hole");
    }
    expected += tensor.storage.size();
  }
  if (expected != data.data() + data.size()) {
    throw std::runtime_error(where + ": holds " + std::to_string(data.size()) +
                             " bytes of data, but its tensors cover only " +
                             std::to_string(expected - data.data()) + "; the file is damaged");
  }
}

std::string header_text(std::span<const TensorToWrite> tensors,
                        const std::map<std::string, std::string>& metadata,
                        const std::string& where) {
  // Joined by hand: a JSON object of the library would sort the tensors by name.
  std::string header = "{";
  if (!metadata.empty()) {
    try {
      header += Json(kMetadataKey).dump() + ":" + Json(metadata).dump();
    } catch (const Json::type_error&) {
      throw std::invalid_argument(where + ": a metadata key or value is not UTF-8");
    }
  }
  size_t begin = 0;
  for (const TensorToWrite& tensor : tensors) {
    if (tensor.name == kMetadataKey) {
      throw std::invalid_argument(where + ": a tensor cannot be named " + in_quotes(kMetadataKey) +
                                  ", which safetensors reserves");
    }
    const size_t end = begin + tensor.data.size();
    header += (header.size() == 1 ? "" : ",") + Json(tensor.name).dump() + ":{\"dtype\":\"" +
              std::string(json_name_of(tensor.dtype)) +
              "\",\"shape\":" + Json(tensor.shape).dump() + ",\"data_offsets\":[" +
              std::to_string(begin) + "," + std::to_string(end) + "]}";
    begin = end;
  }
  header += "}";
  header.append((8 - header.size() % 8) % 8, ' ');
  if (header.size() > kMaxHeaderBytes) {
    throw std::invalid_argument(where + ": the header would have " + std::to_string(header.size()) +
                                " bytes, more than the 100,000,000 that safetensors allows; write "
                                "fewer tensors or less metadata");
  }
  return header;
}

}  // namespace

bool is_safetensors(std::span<const std::byte> file) {
  if (file.size() <= kLengthBytes || file[kLengthBytes] != std::byte{'{'}) {
    return false;
  }
  uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  return length <= kMaxHeaderBytes;
}

WeightFile read_safetensors(const std::string& path) {
  WeightFile file{.path = path,
                  .format = "safetensors",
                  .tensors = {},
                  .metadata = {},
                  .mapping = std::make_shared<const MappedFile>(path)};
  const std::span<const std::byte> bytes = file.mapping->bytes();
  if (!is_safetensors(bytes)) {
    throw std::runtime_error(path +
                             ": does not start as a safetensors file does (a header length of at "
                             "most 100,000,000, then '{')");
  }
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), kLengthBytes);
  if (length > bytes.size() - kLengthBytes) {
    throw std::runtime_error(path + ": " + std::to_string(bytes.size()) +
                             " bytes, but its header alone should have " + std::to_string(length) +
                             "; the copy looks cut short");
  }
  const auto header = bytes.subspan(kLengthBytes, length);
  const auto data = bytes.subspan(kLengthBytes + length);

  HeaderReader reader(path);
  const char* text = reinterpret_cast<const char*>(header.data());
  Json::sax_parse(text, text + header.size(), &reader);

  file.metadata = std::move(reader.metadata);
  std::vector<std::string_view> names;
  for (const HeaderEntry& entry : reader.entries) {
    names.push_back(entry.name);
  }
  check_stored_names(names, path);
  for (const HeaderEntry& entry : reader.entries) {
    file.tensors.push_back(to_tensor(entry, data, path));
  }
  std::stable_sort(file.tensors.begin(), file.tensors.end(), [](const auto& a, const auto& b) {
    // An empty tensor goes before the one that begins where it lies.
    return std::pair(a.storage.data(), a.storage.size()) <
           std::pair(b.storage.data(), b.storage.size());
  });
  check_coverage(file.tensors, data, path);
  return file;
}

WrittenFile write_safetensors(const std::string& path,
                              std::span<const TensorToWrite> tensors,
                              const std::map<std::string, std::string>& metadata) {
  check_tensors_to_write(tensors, path);
  const std::string header = header_text(tensors, metadata, path);
  const uint64_t length = header.size();
  AtomicFile file(path);
  ContentHasher hasher;
  const auto write = [&](std::span<const std::byte> bytes) {
    if (bytes.size() < kLargeBytes) {
      hasher.add(bytes);
      file.write(bytes);
      return;
    }
    std::future<void> hashing = std::async(std::launch::async, [&] { hasher.add(bytes); });
    file.write(bytes);
    hashing.get();
  };
  write(std::as_bytes(std::span(&length, 1)));
  write(std::as_bytes(std::span(header)));
  for (const TensorToWrite& tensor : tensors) {
    write(tensor.data);
  }
  const WrittenFile written{.bytes = file.size(), .checksum = hasher.hash()};
  file.commit();
  return written;
}

}  // namespace rwkv
