#include "model/formats/zip_archive.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>

#include <zlib.h>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

constexpr uint32_t kLocalSignature = 0x04034b50;
constexpr uint32_t kDirectorySignature = 0x02014b50;
constexpr uint32_t kEndSignature = 0x06054b50;
constexpr uint32_t kZip64EndSignature = 0x06064b50;
constexpr uint32_t kZip64LocatorSignature = 0x07064b50;
constexpr uint64_t kLocalBytes = 30;
constexpr uint64_t kDirectoryBytes = 46;
constexpr uint64_t kEndBytes = 22;
constexpr uint64_t kZip64EndBytes = 56;
constexpr uint64_t kZip64LocatorBytes = 20;
constexpr uint64_t kMaxComment = 0xffff;

// In place of a number that stands in a zip64 field instead.
constexpr uint32_t kIn64 = 0xffffffff;
constexpr uint16_t kIn64Short = 0xffff;
constexpr uint16_t kZip64Field = 0x0001;
// PyTorch's padding field, "FB": filled with 'Z' so that data starts at a multiple of 64.
constexpr uint16_t kPaddingField = 0x4246;

constexpr uint16_t kFlagEncrypted = 0x0001;
constexpr uint16_t kFlagUtf8Names = 0x0800;
constexpr uint16_t kVersion = 20;
constexpr uint16_t kVersionZip64 = 45;

template <class T>
T number_at(std::span<const std::byte> bytes, uint64_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// True if `count` bytes from `offset` lie inside `total`, whatever the numbers.
bool lies_inside(uint64_t offset, uint64_t count, uint64_t total) {
  return offset <= total && count <= total - offset;
}

// The zip64 field among an entry's extra fields, if it has one.
std::optional<std::span<const std::byte>> find_zip64_field(std::span<const std::byte> extra) {
  while (extra.size() >= 4) {
    const auto id = number_at<uint16_t>(extra, 0);
    const auto bytes = number_at<uint16_t>(extra, 2);
    if (bytes > extra.size() - 4) {
      return std::nullopt;
    }
    if (id == kZip64Field) {
      return extra.subspan(4, bytes);
    }
    extra = extra.subspan(4 + bytes);
  }
  return std::nullopt;
}

// Little-endian fields one after the other.
class Record {
 public:
  template <class T>
  Record& add(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return *this;
  }
  Record& add_text(std::string_view text) {
    text_ += text;
    return *this;
  }
  std::string take() { return std::move(text_); }
  size_t size() const { return text_.size(); }

 private:
  std::string text_;
};

}  // namespace

ZipArchive::ZipArchive(std::span<const std::byte> file, std::string path)
    : file_(file), path_(std::move(path)) {
  const Directory directory = find_directory();
  directory_offset_ = directory.offset;
  read_entries(directory);
  index_names();
}

void ZipArchive::fail(const std::string& what) const {
  throw std::runtime_error(path_ + ": " + what);
}

ZipArchive::Directory ZipArchive::find_directory() const {
  // The end record is last but for a comment, which PyTorch does not write and others may.
  for (uint64_t comment = 0; comment <= kMaxComment && kEndBytes + comment <= file_.size();
       ++comment) {
    const uint64_t end = file_.size() - kEndBytes - comment;
    if (number_at<uint32_t>(file_, end) != kEndSignature ||
        number_at<uint16_t>(file_, end + 20) != comment) {
      continue;
    }
    Directory directory{.entry_count = number_at<uint16_t>(file_, end + 10),
                        .bytes = number_at<uint32_t>(file_, end + 12),
                        .offset = number_at<uint32_t>(file_, end + 16)};
    uint64_t directory_limit = end;
    if (directory.entry_count == kIn64Short || directory.bytes == kIn64 ||
        directory.offset == kIn64) {
      if (end < kZip64LocatorBytes ||
          number_at<uint32_t>(file_, end - kZip64LocatorBytes) != kZip64LocatorSignature) {
        fail(
            "the zip end record points to a zip64 locator, which is not there; the file is "
            "damaged");
      }
      directory_limit = end - kZip64LocatorBytes;
      directory = read_zip64_directory(directory_limit);
    }
    if (!lies_inside(directory.offset, directory.bytes, directory_limit)) {
      fail("the zip directory is said to be " + std::to_string(directory.bytes) +
           " bytes at offset " + std::to_string(directory.offset) + ", outside the file of " +
           std::to_string(file_.size()) + " bytes; the file is damaged");
    }
    return directory;
  }
  fail(std::to_string(file_.size()) +
       " bytes that start as a zip file does, but without the directory that ends one; the copy "
       "looks cut short");
}

ZipArchive::Directory ZipArchive::read_zip64_directory(uint64_t locator_offset) const {
  const auto offset = number_at<uint64_t>(file_, locator_offset + 8);
  if (!lies_inside(offset, kZip64EndBytes, locator_offset) ||
      number_at<uint32_t>(file_, offset) != kZip64EndSignature) {
    fail("the zip64 locator points to offset " + std::to_string(offset) +
         ", where there is no zip64 end record; the file is damaged");
  }
  return {.entry_count = number_at<uint64_t>(file_, offset + 32),
          .bytes = number_at<uint64_t>(file_, offset + 40),
          .offset = number_at<uint64_t>(file_, offset + 48)};
}

void ZipArchive::read_entries(const Directory& directory) {
  const auto records = file_.subspan(directory.offset, directory.bytes);
  // Known before anything is reserved, so that a false count costs nothing.
  if (directory.entry_count > records.size() / kDirectoryBytes) {
    fail("the zip directory lists " + std::to_string(directory.entry_count) + " entries in " +
         std::to_string(records.size()) + " bytes; the file is damaged");
  }
  entries_.reserve(directory.entry_count);
  uint64_t at = 0;
  for (uint64_t i = 0; i < directory.entry_count; ++i) {
    const std::string which = "entry " + std::to_string(i) + " of the zip directory ";
    if (!lies_inside(at, kDirectoryBytes, records.size()) ||
        number_at<uint32_t>(records, at) != kDirectorySignature) {
      fail(which + "is not where it should be; the file is damaged");
    }
    const uint64_t name_bytes = number_at<uint16_t>(records, at + 28);
    const uint64_t extra_bytes = number_at<uint16_t>(records, at + 30);
    const uint64_t comment_bytes = number_at<uint16_t>(records, at + 32);
    const uint64_t record_bytes = kDirectoryBytes + name_bytes + extra_bytes + comment_bytes;
    if (!lies_inside(at, record_bytes, records.size())) {
      fail(which + "reaches outside the directory; the file is damaged");
    }
    ZipEntry entry{
        .name = {reinterpret_cast<const char*>(records.data()) + at + kDirectoryBytes, name_bytes},
        .flags = number_at<uint16_t>(records, at + 8),
        .method = number_at<uint16_t>(records, at + 10),
        .crc = number_at<uint32_t>(records, at + 16),
        .stored_bytes = number_at<uint32_t>(records, at + 20),
        .header_offset = number_at<uint32_t>(records, at + 42)};
    uint64_t full_bytes = number_at<uint32_t>(records, at + 24);
    // The zip64 field holds, in this order, only the numbers that overflowed.
    uint64_t* const in_order[] = {&full_bytes, &entry.stored_bytes, &entry.header_offset};
    std::span<const std::byte> wide;
    if (std::any_of(
            std::begin(in_order), std::end(in_order), [](auto* n) { return *n == kIn64; })) {
      const auto extra = records.subspan(at + kDirectoryBytes + name_bytes, extra_bytes);
      wide = find_zip64_field(extra).value_or(wide);
      for (uint64_t* number : in_order) {
        if (*number == kIn64) {
          if (wide.size() < sizeof(uint64_t)) {
            fail(which + "lacks its 64-bit size or offset; the file is damaged");
          }
          *number = number_at<uint64_t>(wide, 0);
          wide = wide.subspan(sizeof(uint64_t));
        }
      }
    }
    if (entry.method == 0 && full_bytes != entry.stored_bytes) {
      fail(which + "(" + in_quotes(entry.name) + ") is stored as " +
           std::to_string(entry.stored_bytes) + " bytes of " + std::to_string(full_bytes) +
           "; the file is damaged");
    }
    entries_.push_back(entry);
    at += record_bytes;
  }
}

void ZipArchive::index_names() {
  by_name_.resize(entries_.size());
  for (size_t i = 0; i < by_name_.size(); ++i) {
    by_name_[i] = static_cast<uint32_t>(i);
  }
  std::sort(by_name_.begin(), by_name_.end(), [&](uint32_t a, uint32_t b) {
    return entries_[a].name < entries_[b].name;
  });
  const auto repeated =
      std::adjacent_find(by_name_.begin(), by_name_.end(), [&](uint32_t a, uint32_t b) {
        return entries_[a].name == entries_[b].name;
      });
  if (repeated != by_name_.end()) {
    fail("the zip directory lists " + in_quotes(entries_[*repeated].name) +
         " twice; the file is damaged");
  }
}

const ZipEntry* ZipArchive::find(std::string_view name) const {
  const auto found = std::lower_bound(
      by_name_.begin(), by_name_.end(), name, [&](uint32_t index, std::string_view wanted) {
        return entries_[index].name < wanted;
      });
  return found != by_name_.end() && entries_[*found].name == name ? &entries_[*found] : nullptr;
}

std::span<const std::byte> ZipArchive::data(const ZipEntry& entry) const {
  require_plain(entry.name, entry.method, entry.flags);
  // Everything but the directory lies before the directory.
  if (!lies_inside(entry.header_offset, kLocalBytes, directory_offset_) ||
      number_at<uint32_t>(file_, entry.header_offset) != kLocalSignature) {
    fail(in_quotes(entry.name) + " is said to be at offset " + std::to_string(entry.header_offset) +
         ", where no zip entry starts; the file is damaged");
  }
  // What the local header says of the entry must be what the directory says, or the data that
  // follows it are not the entry's.
  require_plain(entry.name,
                number_at<uint16_t>(file_, entry.header_offset + 8),
                number_at<uint16_t>(file_, entry.header_offset + 6));
  const uint64_t name_begin = entry.header_offset + kLocalBytes;
  const uint64_t name_bytes = number_at<uint16_t>(file_, entry.header_offset + 26);
  const uint64_t start =
      name_begin + name_bytes + number_at<uint16_t>(file_, entry.header_offset + 28);
  if (lies_inside(name_begin, name_bytes, directory_offset_)) {
    const std::string_view name(reinterpret_cast<const char*>(file_.data()) + name_begin,
                                name_bytes);
    if (name != entry.name) {
      fail(in_quotes(entry.name) + " is said to be at offset " +
           std::to_string(entry.header_offset) + ", where " + in_quotes(name) +
           " is; the file is damaged");
    }
  }
  if (!lies_inside(start, entry.stored_bytes, directory_offset_)) {
    fail(in_quotes(entry.name) + " of " + std::to_string(entry.stored_bytes) + " bytes at offset " +
         std::to_string(start) +
         " reaches outside the data; the file is "
         "damaged");
  }
  return file_.subspan(start, entry.stored_bytes);
}

void ZipArchive::verify(const ZipEntry& entry) const {
  const uint32_t crc = crc32_of(data(entry));
  if (entry.crc != 0 && entry.crc != crc) {
    fail(in_quotes(entry.name) + " has the checksum " + std::to_string(crc) + ", expected " +
         std::to_string(entry.crc) +
         " as the zip directory says; the file is damaged: use another "
         "copy");
  }
}

void ZipArchive::require_plain(std::string_view name, uint16_t method, uint16_t flags) const {
  if (method != 0) {
    fail(in_quotes(name) + " is compressed (method " + std::to_string(method) +
         "), expected stored, as torch.save writes it; was the file packed again? Load it with "
         "torch.load and save it anew");
  }
  if ((flags & kFlagEncrypted) != 0) {
    fail(in_quotes(name) + " is encrypted, expected plain");
  }
}

uint32_t crc32_of(std::span<const std::byte> data) {
  return static_cast<uint32_t>(
      ::crc32_z(0, reinterpret_cast<const unsigned char*>(data.data()), data.size()));
}

ZipWriter::ZipWriter(AtomicFile& file, uint64_t zip64_from)
    : file_(file), zip64_from_(zip64_from) {}

void ZipWriter::add(std::string_view name, std::string_view text) {
  add(name, std::as_bytes(std::span(text.data(), text.size())));
}

void ZipWriter::add(std::string_view name, std::span<const std::byte> data) {
  const Written entry{.name = std::string(name),
                      .crc = data.empty() ? 0 : crc32_of(data),
                      .bytes = data.size(),
                      .header_offset = file_.size()};
  const bool wide = entry.bytes >= zip64_from_;
  Record extra;
  if (wide) {
    extra.add(kZip64Field).add(uint16_t{16}).add(entry.bytes).add(entry.bytes);
  }
  // The padding field's own 4 bytes count too.
  const uint64_t unpadded = entry.header_offset + kLocalBytes + name.size() + extra.size() + 4;
  const uint64_t padding = (kAlignment - unpadded % kAlignment) % kAlignment;
  extra.add(kPaddingField).add(static_cast<uint16_t>(padding)).add_text(std::string(padding, 'Z'));

  const uint32_t bytes32 = wide ? kIn64 : static_cast<uint32_t>(entry.bytes);
  Record header;
  header.add(kLocalSignature)
      .add(wide ? kVersionZip64 : kVersion)
      .add(kFlagUtf8Names)
      .add(uint16_t{0})  // stored
      .add(uint32_t{0})  // no time: the same tensors make the same file
      .add(entry.crc)
      .add(bytes32)
      .add(bytes32)
      .add(static_cast<uint16_t>(name.size()))
      .add(static_cast<uint16_t>(extra.size()))
      .add_text(name)
      .add_text(extra.take());
  file_.write(header.take());
  file_.write(data);
  written_.push_back(entry);
}

std::string ZipWriter::directory_record(const Written& entry) const {
  const bool wide_bytes = entry.bytes >= zip64_from_;
  const bool wide_offset = entry.header_offset >= zip64_from_;
  Record extra;
  if (wide_bytes || wide_offset) {
    extra.add(kZip64Field).add(static_cast<uint16_t>(16 * wide_bytes + 8 * wide_offset));
    if (wide_bytes) {
      extra.add(entry.bytes).add(entry.bytes);
    }
    if (wide_offset) {
      extra.add(entry.header_offset);
    }
  }
  const uint16_t version = wide_bytes || wide_offset ? kVersionZip64 : kVersion;
  const uint32_t bytes32 = wide_bytes ? kIn64 : static_cast<uint32_t>(entry.bytes);
  Record record;
  record.add(kDirectorySignature)
      .add(version)  // made by
      .add(version)  // needed to extract
      .add(kFlagUtf8Names)
      .add(uint16_t{0})  // stored
      .add(uint32_t{0})  // no time
      .add(entry.crc)
      .add(bytes32)
      .add(bytes32)
      .add(static_cast<uint16_t>(entry.name.size()))
      .add(static_cast<uint16_t>(extra.size()))
      .add(uint16_t{0})  // no comment
      .add(uint16_t{0})  // first disk
      .add(uint16_t{0})  // internal attributes
      .add(uint32_t{0})  // external attributes
      .add(wide_offset ? kIn64 : static_cast<uint32_t>(entry.header_offset))
      .add_text(entry.name)
      .add_text(extra.take());
  return record.take();
}

void ZipWriter::finish() {
  const uint64_t offset = file_.size();
  for (const Written& entry : written_) {
    file_.write(directory_record(entry));
  }
  const uint64_t bytes = file_.size() - offset;
  const uint64_t count = written_.size();
  const bool wide = count >= kIn64Short || offset >= zip64_from_ || bytes >= zip64_from_;
  Record end;
  if (wide) {
    end.add(kZip64EndSignature)
        .add(uint64_t{kZip64EndBytes - 12})  // what follows this field
        .add(kVersionZip64)
        .add(kVersionZip64)
        .add(uint32_t{0})  // this disk
        .add(uint32_t{0})  // the directory's disk
        .add(count)
        .add(count)
        .add(bytes)
        .add(offset);
    end.add(kZip64LocatorSignature)
        .add(uint32_t{0})  // the zip64 end record's disk
        .add(offset + bytes)
        .add(uint32_t{1});  // disks in all
  }
  const uint16_t count16 = wide ? kIn64Short : static_cast<uint16_t>(count);
  end.add(kEndSignature)
      .add(uint16_t{0})  // this disk
      .add(uint16_t{0})  // the directory's disk
      .add(count16)
      .add(count16)
      .add(wide ? kIn64 : static_cast<uint32_t>(bytes))
      .add(wide ? kIn64 : static_cast<uint32_t>(offset))
      .add(uint16_t{0});  // no comment
  file_.write(end.take());
}

}  // namespace rwkv
