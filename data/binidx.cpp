#include "data/binidx.h"

#include <bit>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <type_traits>

#include <nlohmann/json.hpp>
#include <unistd.h>

#include "data/content_hash.h"
#include "data/json_text.h"
#include "data/number_text.h"

namespace rwkv {
namespace {

static_assert(std::endian::native == std::endian::little, "the files are little-endian");

constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr char kOldMagic[8] = {'T', 'N', 'T', 'I', 'D', 'X', '\0', '\0'};
constexpr size_t kHeaderBytes = 34;
constexpr uint64_t kMaxRecordBytes = 1 << 20;
// Ours have at most 46: a kind and a hash.
constexpr size_t kMaxIdentityBytes = 200;

template <typename T>
T load(std::span<const std::byte> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

std::string counted(int64_t number) {
  return grouped(static_cast<uint64_t>(number));
}

int64_t item_bytes(TokenDtype dtype) {
  switch (dtype) {
    case TokenDtype::kU8:
    case TokenDtype::kI8:
      return 1;
    case TokenDtype::kI16:
    case TokenDtype::kU16:
      return 2;
    case TokenDtype::kI32:
      return 4;
    case TokenDtype::kI64:
      break;
  }
  return 8;
}

TokenDtype parse_dtype(uint8_t code, const std::string& path) {
  if (code == 6 || code == 7) {
    throw std::runtime_error(path + ": dtype code " + std::to_string(code) +
                             " is a float type; expected integer token ids (code 1 to 5, or 8)");
  }
  if (code < 1 || code > 8) {
    throw std::runtime_error(path + ": dtype code " + std::to_string(code) +
                             " is not known; expected 1 to 5, or 8; the file looks damaged");
  }
  return static_cast<TokenDtype>(code);
}

template <typename T>
void widen(std::span<const std::byte> bytes, int64_t begin, std::span<int64_t> out) {
  const size_t first = static_cast<size_t>(begin) * sizeof(T);
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<int64_t>(load<T>(bytes, first + i * sizeof(T)));
  }
}

constexpr const char* kRecordAdvice =
    "tokenize the text again, or remove the file to use the corpus without it";

[[noreturn]] void fail_record(const std::string& path, const std::string& what) {
  throw std::runtime_error(path + ": " + what + "; " + kRecordAdvice);
}

// Takes `key` out of `json`, which must have it with an integer in [low, high].
int64_t take_integer(
    nlohmann::json& json, const std::string& path, const char* key, int64_t low, int64_t high) {
  const auto found = json.find(key);
  const std::string quoted = std::string("\"") + key + "\"";
  if (found == json.end()) {
    fail_record(path, "has no key " + quoted);
  }
  // A number past 2^63 - 1 is unsigned, and get<int64_t> would wrap it.
  const bool fits = found->is_number_integer() &&
                    (!found->is_number_unsigned() || found->get<uint64_t>() >> 63 == 0);
  if (!fits || found->get<int64_t>() < low || found->get<int64_t>() > high) {
    fail_record(path,
                quoted + " is " + shown_json(*found) + ", expected an integer from " +
                    std::to_string(low) + " to " + std::to_string(high));
  }
  const auto value = found->get<int64_t>();
  json.erase(found);
  return value;
}

TokenizerRecord read_record(const std::string& path, int64_t num_tokens) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  nlohmann::json json = parse_json(read_text_file(path, kMaxRecordBytes), path, kRecordAdvice);
  if (!json.is_object()) {
    fail_record(path, std::string("is JSON of type ") + json.type_name() + ", expected an object");
  }
  TokenizerRecord record;
  const auto identity = json.find("identity");
  if (identity == json.end() || !identity->is_string() || identity->get<std::string>().empty()) {
    fail_record(path, "has no string \"identity\"");
  }
  record.identity = identity->get<std::string>();
  // Errors quote it whole.
  if (record.identity.size() > kMaxIdentityBytes) {
    fail_record(path,
                "\"identity\" has " + grouped(record.identity.size()) +
                    " bytes, expected at most " + std::to_string(kMaxIdentityBytes));
  }
  json.erase(identity);
  record.vocab_size =
      take_integer(json, path, "vocab_size", 1, int64_t{std::numeric_limits<int32_t>::max()} + 1);
  if (const auto found = json.find("end_of_document"); found != json.end() && found->is_null()) {
    json.erase(found);
  } else {
    record.end_of_document =
        static_cast<int32_t>(take_integer(json, path, "end_of_document", 0, record.vocab_size - 1));
  }
  record.text_bytes = take_integer(json, path, "text_bytes", 0, kMost);
  const int64_t recorded_tokens = take_integer(json, path, "num_tokens", 0, kMost);
  if (!json.empty()) {
    fail_record(path, "has a key that is not known: " + shown_json(json.begin().key()));
  }
  if (recorded_tokens != num_tokens) {
    fail_record(path,
                "describes a corpus of " + counted(recorded_tokens) + " tokens, but this one has " +
                    counted(num_tokens));
  }
  return record;
}

template <typename T>
void append(AtomicFile& file, T value) {
  file.write(std::as_bytes(std::span(&value, 1)));
}

TokenizerRecord checked(TokenizerRecord record) {
  const int64_t most = int64_t{std::numeric_limits<int32_t>::max()} + 1;
  if (record.identity.empty()) {
    throw std::invalid_argument("the tokenizer has no identity; expected one such as \"bytes\"");
  }
  if (record.vocab_size < 1 || record.vocab_size > most) {
    throw std::invalid_argument("the vocabulary has " + std::to_string(record.vocab_size) +
                                " ids; expected 1 to " + std::to_string(most));
  }
  if (record.end_of_document.has_value() &&
      (*record.end_of_document < 0 || *record.end_of_document >= record.vocab_size)) {
    throw std::invalid_argument("the end-of-document id is " +
                                std::to_string(*record.end_of_document) + "; expected 0 to " +
                                std::to_string(record.vocab_size - 1));
  }
  return record;
}

}  // namespace

std::string corpus_prefix(const std::string& path) {
  return path.ends_with(".bin") || path.ends_with(".idx") ? path.substr(0, path.size() - 4) : path;
}

BinidxFile::BinidxFile(const std::string& prefix)
    : prefix_(corpus_prefix(prefix)), idx_(prefix_ + ".idx"), bin_(prefix_ + ".bin") {
  check_index();
  const std::string record_path = prefix_ + ".tokenizer.json";
  if (std::filesystem::exists(record_path)) {
    record_ = read_record(record_path, num_tokens_);
  }
}

void BinidxFile::check_index() {
  const std::span<const std::byte> idx = idx_.bytes();
  const std::string& path = idx_.path();
  if (idx.size() >= sizeof kOldMagic && std::memcmp(idx.data(), kOldMagic, sizeof kOldMagic) == 0) {
    throw std::runtime_error(path +
                             ": is an old TNTIDX index; expected MMIDIDX; tokenize the text "
                             "again");
  }
  if (idx.size() < sizeof kMagic || std::memcmp(idx.data(), kMagic, sizeof kMagic) != 0) {
    throw std::runtime_error(path +
                             ": does not start with MMIDIDX and two NUL bytes; expected a "
                             "Megatron index; is it the right file?");
  }
  if (idx.size() < kHeaderBytes) {
    throw std::runtime_error(path + ": " + grouped(idx.size()) +
                             " bytes, but the header alone has " + grouped(kHeaderBytes) +
                             "; the copy looks cut short");
  }
  if (const auto version = load<uint64_t>(idx, 9); version != 1) {
    throw std::runtime_error(path + ": version " + std::to_string(version) + ", expected 1");
  }
  dtype_ = parse_dtype(load<uint8_t>(idx, 17), path);
  const auto n = load<uint64_t>(idx, 18);
  const auto d = load<uint64_t>(idx, 26);
  // Compared by division: the product of a damaged count could overflow.
  const uint64_t room = idx.size() - kHeaderBytes;
  if (n > room / 12 || d > (room - 12 * n) / 8) {
    throw std::runtime_error(path + ": " + grouped(idx.size()) + " bytes, too few for the " +
                             grouped(n) + " items and " + grouped(d) +
                             " document marks that it lists; the copy looks cut short");
  }
  num_items_ = static_cast<int64_t>(n);
  check_items(static_cast<int64_t>(d));
}

void BinidxFile::check_items(int64_t num_marks) {
  const std::string& path = idx_.path();
  const int64_t width = item_bytes(dtype_);
  int64_t bytes = 0;
  for (int64_t i = 0; i < num_items_; ++i) {
    const auto size = load<int32_t>(idx_.bytes(), kHeaderBytes + 4 * static_cast<size_t>(i));
    const auto offset = load<int64_t>(
        idx_.bytes(),
        kHeaderBytes + 4 * static_cast<size_t>(num_items_) + 8 * static_cast<size_t>(i));
    if (size < 0) {
      throw std::runtime_error(path + ": item " + counted(i) + " has " + std::to_string(size) +
                               " tokens, expected 0 or more; the file looks damaged");
    }
    if (offset != bytes) {
      throw std::runtime_error(path + ": item " + counted(i) + " starts at byte " +
                               std::to_string(offset) + ", but the items before it end at " +
                               counted(bytes) + "; the file looks damaged");
    }
    if (__builtin_add_overflow(bytes, int64_t{size} * width, &bytes)) {
      throw std::runtime_error(path + ": lists more bytes than a file can have; it looks damaged");
    }
  }
  num_tokens_ = bytes / width;
  if (bin_.bytes().size() != static_cast<uint64_t>(bytes)) {
    throw std::runtime_error(bin_.path() + ": " + grouped(bin_.bytes().size()) + " bytes, but " +
                             path + " lists " + counted(num_tokens_) + " tokens of " +
                             std::to_string(width) + " bytes (" + counted(bytes) + "); " +
                             (bin_.bytes().size() < static_cast<uint64_t>(bytes)
                                  ? "the copy looks cut short"
                                  : "the two files do not belong together"));
  }
  if (num_tokens_ == 0) {
    throw std::runtime_error(path + ": lists no tokens; expected one or more; was the text empty?");
  }
  if (num_marks < 1) {
    throw std::runtime_error(path +
                             ": has no document marks, expected one more than documents; "
                             "the file looks damaged");
  }
  num_documents_ = num_marks - 1;
  for (int64_t i = 0, last = 0; i < num_marks; ++i) {
    const int64_t mark = document_mark(i);
    if (mark < last || mark > num_items_ || (i == 0 && mark != 0)) {
      throw std::runtime_error(
          path + ": document mark " + counted(i) + " is " + std::to_string(mark) + ", expected " +
          (i == 0 ? "0" : std::to_string(last) + " to " + std::to_string(num_items_)) +
          "; the file looks damaged");
    }
    last = mark;
  }
  if (document_mark(num_documents_) != num_items_) {
    throw std::runtime_error(path + ": the last document mark is " +
                             counted(document_mark(num_documents_)) + ", expected the " +
                             counted(num_items_) + " items; the file looks damaged");
  }
}

int64_t BinidxFile::document_mark(int64_t i) const {
  return load<int64_t>(
      idx_.bytes(),
      kHeaderBytes + 12 * static_cast<size_t>(num_items_) + 8 * static_cast<size_t>(i));
}

int64_t BinidxFile::item_begin(int64_t item) const {
  if (item == num_items_) {
    return num_tokens_;
  }
  const auto offset = load<int64_t>(
      idx_.bytes(),
      kHeaderBytes + 4 * static_cast<size_t>(num_items_) + 8 * static_cast<size_t>(item));
  return offset / item_bytes(dtype_);
}

int64_t BinidxFile::document_begin(int64_t i) const {
  if (i < 0 || i >= num_documents_) {
    throw std::out_of_range(prefix_ + ": document " + std::to_string(i) + " was asked for, but " +
                            "there are " + counted(num_documents_));
  }
  return item_begin(document_mark(i));
}

int64_t BinidxFile::document_end(int64_t i) const {
  document_begin(i);  // for its check of i
  return item_begin(document_mark(i + 1));
}

std::string BinidxFile::fingerprint() const {
  constexpr size_t kStretches = 64;
  constexpr size_t kStretchBytes = 4096;
  const std::span<const std::byte> bin = bin_.bytes();
  std::vector<std::byte> seen;
  if (bin.size() <= kStretches * kStretchBytes) {
    seen.assign(bin.begin(), bin.end());
  } else {
    const size_t last_begin = bin.size() - kStretchBytes;
    for (size_t i = 0; i < kStretches; ++i) {
      // In this order, for the product of two sizes could overflow.
      const size_t begin = last_begin / (kStretches - 1) * i;
      const auto stretch = bin.subspan(i + 1 == kStretches ? last_begin : begin, kStretchBytes);
      seen.insert(seen.end(), stretch.begin(), stretch.end());
    }
  }
  return counted(num_tokens_) + " tokens (" + content_hash(seen) + ")";
}

void BinidxFile::read(int64_t begin, std::span<int64_t> out) const {
  if (begin < 0 || begin > num_tokens_ || out.size() > static_cast<uint64_t>(num_tokens_ - begin)) {
    throw std::out_of_range(bin_.path() + ": " + grouped(out.size()) + " tokens from position " +
                            std::to_string(begin) + " were asked for, but there are " +
                            counted(num_tokens_));
  }
  switch (dtype_) {
    case TokenDtype::kU8:
      return widen<uint8_t>(bin_.bytes(), begin, out);
    case TokenDtype::kI8:
      return widen<int8_t>(bin_.bytes(), begin, out);
    case TokenDtype::kI16:
      return widen<int16_t>(bin_.bytes(), begin, out);
    case TokenDtype::kI32:
      return widen<int32_t>(bin_.bytes(), begin, out);
    case TokenDtype::kI64:
      return widen<int64_t>(bin_.bytes(), begin, out);
    case TokenDtype::kU16:
      return widen<uint16_t>(bin_.bytes(), begin, out);
  }
}

void require_ids_below(int64_t vocab_size,
                       const BinidxFile& file,
                       int64_t begin,
                       std::span<const int64_t> ids) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      throw std::runtime_error(
          file.prefix() + ".bin: the token at position " +
          counted(begin + static_cast<int64_t>(i)) + " has id " + std::to_string(ids[i]) +
          ", but the vocabulary has " + counted(vocab_size) + " ids (0 to " +
          std::to_string(vocab_size - 1) + "); was the corpus made with another tokenizer?");
    }
  }
}

BinidxWriter::BinidxWriter(const std::string& prefix,
                           TokenizerRecord record,
                           int64_t max_item_tokens)
    : prefix_(corpus_prefix(prefix)),
      record_(checked(std::move(record))),
      max_item_tokens_(max_item_tokens),
      dtype_(record_.vocab_size <= 65536 ? TokenDtype::kU16 : TokenDtype::kI32),
      bin_(prefix_ + ".bin") {
  if (max_item_tokens < 1 || max_item_tokens > std::numeric_limits<int32_t>::max()) {
    throw std::invalid_argument("max_item_tokens = " + std::to_string(max_item_tokens) +
                                "; expected 1 to " +
                                std::to_string(std::numeric_limits<int32_t>::max()));
  }
}

BinidxWriter::~BinidxWriter() = default;

void BinidxWriter::write_ids(std::span<const int32_t> ids) {
  while (!ids.empty()) {
    if (item_tokens_ == max_item_tokens_) {
      end_item();
      continuing_items_.push_back(static_cast<int64_t>(sizes_.size()));
    }
    const auto room = static_cast<size_t>(max_item_tokens_ - item_tokens_);
    const auto part = ids.first(std::min(ids.size(), room));
    ids = ids.subspan(part.size());
    if (dtype_ == TokenDtype::kU16) {
      narrow_.assign(part.begin(), part.end());
      bin_.write(std::as_bytes(std::span(narrow_)));
    } else {
      bin_.write(std::as_bytes(part));
    }
    item_tokens_ += static_cast<int64_t>(part.size());
    num_tokens_ += static_cast<int64_t>(part.size());
  }
}

void BinidxWriter::add_tokens(std::span<const int32_t> ids) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= record_.vocab_size) {
      throw std::invalid_argument(
          prefix_ + ".bin: token " + counted(num_tokens_ + static_cast<int64_t>(i)) +
          " is to have id " + std::to_string(ids[i]) + ", but the vocabulary of " +
          record_.identity + " has " + counted(record_.vocab_size) + " ids (0 to " +
          std::to_string(record_.vocab_size - 1) + ")");
    }
  }
  write_ids(ids);
  in_document_ = in_document_ || !ids.empty();
}

void BinidxWriter::end_item() {
  sizes_.push_back(static_cast<int32_t>(item_tokens_));
  item_tokens_ = 0;
}

void BinidxWriter::end_document() {
  if (!in_document_) {
    return;
  }
  if (record_.end_of_document.has_value()) {
    write_ids({&*record_.end_of_document, 1});
  }
  end_item();
  ++num_documents_;
  in_document_ = false;
}

void BinidxWriter::finish(int64_t text_bytes) {
  if (in_document_) {
    throw std::logic_error(prefix_ + ": finish() inside a document; call end_document() first");
  }
  if (num_documents_ == 0) {
    throw std::runtime_error(prefix_ +
                             ": the text holds no document with a token in it, so there "
                             "is no corpus to write; expected one or more");
  }
  record_.text_bytes = text_bytes;
  // A full disk shows here, while an older corpus of the same name is still whole.
  bin_.prepare();
  AtomicFile record(prefix_ + ".tokenizer.json");
  write_record(record);
  AtomicFile index(prefix_ + ".idx");
  write_index(index);
  // Without an .idx nothing can be read: from here to the last commit there is none.
  const std::string idx_path = prefix_ + ".idx";
  if (::unlink(idx_path.c_str()) != 0 && errno != ENOENT) {
    throw std::runtime_error(idx_path + ": cannot be replaced: " + std::strerror(errno));
  }
  const std::string folder = std::filesystem::path(idx_path).parent_path().string();
  sync_folder(folder.empty() ? "." : folder);
  bin_.commit();
  record.commit();
  index.commit();
}

void BinidxWriter::write_record(AtomicFile& file) const {
  nlohmann::ordered_json json;
  json["identity"] = record_.identity;
  json["vocab_size"] = record_.vocab_size;
  json["end_of_document"] = nullptr;
  if (record_.end_of_document.has_value()) {
    json["end_of_document"] = *record_.end_of_document;
  }
  json["text_bytes"] = record_.text_bytes;
  json["num_tokens"] = num_tokens_;
  file.write(json.dump(2) + "\n");
  file.prepare();
}

void BinidxWriter::write_index(AtomicFile& file) const {
  const auto num_items = static_cast<int64_t>(sizes_.size());
  file.write(std::string_view(kMagic, sizeof kMagic));
  append(file, uint64_t{1});
  append(file, static_cast<uint8_t>(dtype_));
  append(file, static_cast<uint64_t>(num_items));
  append(file, static_cast<uint64_t>(num_documents_) + 1);
  file.write(std::as_bytes(std::span(sizes_)));
  int64_t offset = 0;
  for (const int32_t size : sizes_) {
    append(file, offset);
    offset += size * item_bytes(dtype_);
  }
  auto continuing = continuing_items_.begin();
  for (int64_t item = 0; item < num_items; ++item) {
    if (continuing != continuing_items_.end() && *continuing == item) {
      ++continuing;
    } else {
      append(file, item);
    }
  }
  append(file, num_items);
  file.prepare();
}

}  // namespace rwkv
