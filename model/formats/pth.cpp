#include "model/formats/pth.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "data/atomic_file.h"
#include "data/number_text.h"
#include "model/formats/checks.h"
#include "model/formats/pickle.h"
#include "model/formats/state_dict.h"
#include "model/formats/zip_archive.h"

namespace rwkv {
namespace {

// Any name will do: PyTorch takes what stands before "/data.pkl". A fixed one keeps the bytes the
// same whatever the file is called.
constexpr std::string_view kFolder = "archive";

// 0x1950a86a20f9469cfc6c, low byte first, as LONG1 writes it.
constexpr std::string_view kLegacyMagic("\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", 10);
constexpr int64_t kLegacyProtocol = 1001;

// A tensor may repeat elements (stride 0) and tensors may share them, but a small file must not
// claim gigabytes. All tensors together may be 4 times the file, a small file's up to 256 times as
// long as they stay under 128 MiB.
int64_t max_tensor_bytes(int64_t file_bytes) {
  return std::max(4 * file_bytes, std::min(256 * file_bytes, int64_t{128} << 20));
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

bool starts_like_zip(std::span<const std::byte> file) {
  return as_text(file).starts_with("PK\x03\x04");
}

bool starts_like_legacy(std::span<const std::byte> file) {
  // PROTO, its number, from protocol 4 on FRAME and 8 bytes; then LONG1 of 10 bytes.
  const std::string_view text = as_text(file);
  const std::string magic = "\x8a\x0a" + std::string(kLegacyMagic);
  const auto has_at = [&](size_t offset) {
    return text.size() >= offset && text.substr(offset).starts_with(magic);
  };
  return text.starts_with('\x80') && (has_at(2) || (has_at(11) && text[2] == '\x95'));
}

// The tensors as the caller sees them, checked against the bytes that are there. `bytes_of` gives
// the bytes of a storage that the file holds.
template <class BytesOf>
std::vector<StoredTensor> resolve(std::vector<TensorReference> references,
                                  BytesOf bytes_of,
                                  const MappedFile& file) {
  std::vector<StoredTensor> tensors;
  tensors.reserve(references.size());
  const int64_t limit = max_tensor_bytes(static_cast<int64_t>(file.bytes().size()));
  int64_t total_bytes = 0;
  for (TensorReference& reference : references) {
    tensors.push_back({.name = std::move(reference.name),
                       .dtype = reference.storage.dtype,
                       .shape = std::move(reference.shape),
                       .strides = std::move(reference.strides),
                       .storage = bytes_of(reference.storage),
                       .offset = reference.offset});
    const StoredTensor& tensor = tensors.back();
    check_stored_tensor(tensor, file.path());
    if (__builtin_add_overflow(
            total_bytes, tensor.num_elements() * size_of(tensor.dtype), &total_bytes) ||
        total_bytes > limit) {
      throw std::runtime_error(file.path() + ": its tensors up to " + in_quotes(tensor.name) +
                               " have " + grouped(static_cast<uint64_t>(total_bytes)) +
                               " bytes, expected at most " + grouped(static_cast<uint64_t>(limit)) +
                               " in a file of " + grouped(file.bytes().size()) +
                               "; save tensor.clone() of those that repeat or share elements");
    }
  }
  return tensors;
}

// ---- Zip container ------------------------------------------------------------------------------

// "<folder>/", where <folder>/data.pkl is.
std::string_view find_folder(const ZipArchive& archive, const std::string& path) {
  constexpr std::string_view kPickle = "data.pkl";
  for (const ZipEntry& entry : archive.entries()) {
    const size_t slash = entry.name.find('/');
    if (slash != std::string_view::npos && entry.name.substr(slash + 1) == kPickle) {
      const std::string_view folder = entry.name.substr(0, slash + 1);
      if (archive.find(std::string(folder) + "constants.pkl") != nullptr) {
        throw std::runtime_error(path +
                                 ": is a TorchScript program, expected a state dict; save "
                                 "model.state_dict() with torch.save");
      }
      return folder;
    }
  }
  throw std::runtime_error(path + ": is a zip file of " + std::to_string(archive.entries().size()) +
                           " entries without a data.pkl, expected what torch.save writes; is it "
                           "an archive that holds the weights?");
}

std::vector<StoredTensor> read_zip(const MappedFile& file) {
  const ZipArchive archive(file.bytes(), file.path());
  const std::string folder(find_folder(archive, file.path()));
  if (const ZipEntry* order = archive.find(folder + "byteorder")) {
    const std::string_view text = as_text(archive.data(*order));
    if (text != "little") {
      throw std::runtime_error(file.path() + ": its byte order is " + in_quotes(text) +
                               ", expected \"little\"; save it on a little-endian machine");
    }
  }
  const ZipEntry& pickle_entry = *archive.find(folder + "data.pkl");
  archive.verify(pickle_entry);
  const std::string where = file.path() + ": data.pkl";
  const Pickle pickle = read_pickle(archive.data(pickle_entry), where, state_dict_globals());

  const auto bytes_of = [&](const StorageReference& storage) {
    const ZipEntry* entry = archive.find(folder + "data/" + std::string(storage.key));
    if (entry == nullptr) {
      throw std::runtime_error(file.path() + ": lacks the storage " +
                               in_quotes("data/" + std::string(storage.key)) +
                               " that data.pkl lists; the file is damaged");
    }
    const auto bytes = archive.data(*entry);
    const int64_t expected[] = {storage.num_elements};
    const int64_t n = checked_num_elements(expected, size_of(storage.dtype));
    if (n < 0 || static_cast<uint64_t>(n * size_of(storage.dtype)) != bytes.size()) {
      throw std::runtime_error(
          file.path() + ": " + in_quotes(entry->name) + " has " + std::to_string(bytes.size()) +
          " bytes, but data.pkl lists " + std::to_string(storage.num_elements) + " " +
          std::string(name_of(storage.dtype)) + " elements; the file is damaged");
    }
    if (storage.view) {
      throw std::runtime_error(file.path() + ": data.pkl lists a view of the storage " +
                               in_quotes(storage.key) +
                               ", which only the legacy container has; the file is damaged");
    }
    return bytes;
  };
  return resolve(find_state_dict(pickle, where), bytes_of, file);
}

// ---- Legacy container ---------------------------------------------------------------------------

class LegacyReader {
 public:
  explicit LegacyReader(const MappedFile& file) : file_(file), rest_(file.bytes()) {}

  std::vector<StoredTensor> read() {
    const Pickle magic = next_pickle("the first pickle");
    const PickleValue& number = magic[magic.root];
    if (number.kind != PickleValue::Kind::kBigInteger || number.text != kLegacyMagic) {
      fail("the magic number of the legacy container is not where it should be");
    }
    const Pickle protocol = next_pickle("the second pickle");
    if (protocol[protocol.root].kind != PickleValue::Kind::kInteger ||
        protocol[protocol.root].integer != kLegacyProtocol) {
      fail("the legacy container has another protocol, expected 1001");
    }
    check_byte_order(next_pickle("the third pickle"));
    const std::string where = file_.path() + ": the object's pickle";
    const Pickle object = next_pickle("the object's pickle");
    const Pickle keys = next_pickle("the pickle of storage keys");
    read_storages(keys, list_storages(object, where));
    return resolve(
        find_state_dict(object, where),
        [&](const StorageReference& storage) { return bytes_of(storage); },
        file_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(file_.path() + ": " + what + "; the file is damaged");
  }

  Pickle next_pickle(const std::string& which) {
    Pickle pickle = read_pickle(rest_, file_.path() + ": " + which, state_dict_globals());
    rest_ = rest_.subspan(pickle.bytes_read);
    return pickle;
  }

  void check_byte_order(const Pickle& facts) const {
    const std::vector<PickleIndex>& items = facts[facts.root].items;
    for (size_t i = 0; i + 1 < items.size(); i += 2) {
      if (facts[items[i]].text == "little_endian" && facts[items[i + 1]].integer != 1) {
        throw std::runtime_error(file_.path() +
                                 ": its numbers are big-endian, expected little-endian; save it "
                                 "on a little-endian machine");
      }
    }
  }

  // For each key, in order: i64 numel, then the bytes.
  void read_storages(const Pickle& keys, const std::vector<StorageReference>& references) {
    std::map<std::string_view, StorageReference> by_key;
    for (const StorageReference& reference : references) {
      const auto [known, is_new] = by_key.emplace(reference.key, reference);
      if (!is_new && (known->second.dtype != reference.dtype ||
                      known->second.num_elements != reference.num_elements)) {
        fail("the storage " + in_quotes(reference.key) + " is listed with two types or sizes");
      }
    }
    if (keys[keys.root].kind != PickleValue::Kind::kList) {
      fail("the storage keys are not a list");
    }
    for (const PickleIndex item : keys[keys.root].items) {
      const auto reference = by_key.find(keys[item].text);
      if (reference == by_key.end()) {
        fail("a storage " + in_quotes(keys[item].text) + " is listed that no tensor uses");
      }
      read_storage(reference->second);
    }
  }

  void read_storage(const StorageReference& storage) {
    const int64_t expected[] = {storage.num_elements};
    const int64_t n = checked_num_elements(expected, size_of(storage.dtype));
    int64_t stored = 0;
    if (rest_.size() >= sizeof stored) {
      std::memcpy(&stored, rest_.data(), sizeof stored);
      rest_ = rest_.subspan(sizeof stored);
    } else {
      stored = -1;
    }
    const auto bytes = static_cast<uint64_t>(n * size_of(storage.dtype));
    if (n < 0 || stored != n || bytes > rest_.size()) {
      throw std::runtime_error(
          file_.path() + ": the storage " + in_quotes(storage.key) + " has " +
          std::to_string(storage.num_elements) + " " + std::string(name_of(storage.dtype)) +
          " elements in the pickle, but " + std::to_string(stored) + " in its own header and " +
          std::to_string(rest_.size()) + " bytes after it; the copy looks cut short");
    }
    if (!storages_.emplace(storage.key, rest_.first(bytes)).second) {
      fail("the storage " + in_quotes(storage.key) + " is listed twice");
    }
    rest_ = rest_.subspan(bytes);
  }

  std::span<const std::byte> bytes_of(const StorageReference& storage) const {
    const auto found = storages_.find(storage.key);
    if (found == storages_.end()) {
      fail("the storage " + in_quotes(storage.key) + " of a tensor is missing");
    }
    if (!storage.view) {
      return found->second;
    }
    if (storage.view->offset > storage.num_elements ||
        storage.view->num_elements > storage.num_elements - storage.view->offset) {
      fail("a view of the storage " + in_quotes(storage.key) + " reaches outside it");
    }
    const auto element_bytes = static_cast<size_t>(size_of(storage.dtype));
    return found->second.subspan(static_cast<size_t>(storage.view->offset) * element_bytes,
                                 static_cast<size_t>(storage.view->num_elements) * element_bytes);
  }

  const MappedFile& file_;
  std::span<const std::byte> rest_;
  std::map<std::string_view, std::span<const std::byte>> storages_;
};

}  // namespace

bool is_pth(std::span<const std::byte> file) {
  return starts_like_zip(file) || starts_like_legacy(file);
}

WeightFile read_pth(const std::string& path) {
  WeightFile file{.path = path,
                  .format = "pth",
                  .tensors = {},
                  .metadata = {},
                  .mapping = std::make_shared<const MappedFile>(path)};
  if (starts_like_zip(file.mapping->bytes())) {
    file.tensors = read_zip(*file.mapping);
  } else if (starts_like_legacy(file.mapping->bytes())) {
    file.format = "pth (legacy)";
    file.tensors = LegacyReader(*file.mapping).read();
  } else {
    throw std::runtime_error(path +
                             ": does not start as torch.save's files do (a zip file, or the "
                             "magic number of the legacy container)");
  }
  return file;
}

void verify_checksums(const WeightFile& file) {
  if (file.mapping == nullptr || !starts_like_zip(file.mapping->bytes())) {
    return;
  }
  const ZipArchive archive(file.mapping->bytes(), file.path);
  const std::string storages = std::string(find_folder(archive, file.path)) + "data/";
  for (const ZipEntry& entry : archive.entries()) {
    if (entry.name.starts_with(storages)) {
      archive.verify(entry);
    }
  }
}

void write_pth(const std::string& path, std::span<const TensorToWrite> tensors) {
  check_tensors_to_write(tensors, path);
  AtomicFile file(path);
  ZipWriter zip(file);
  const std::string folder = std::string(kFolder) + "/";
  zip.add(folder + "data.pkl", write_state_dict(tensors));
  zip.add(folder + "byteorder", "little");
  for (size_t i = 0; i < tensors.size(); ++i) {
    zip.add(folder + "data/" + std::to_string(i), tensors[i].data);
  }
  // PyTorch refuses a file without this entry.
  zip.add(folder + "version", "3\n");
  zip.finish();
  file.commit();
}

}  // namespace rwkv
