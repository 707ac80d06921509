// Zip files as torch.save makes them: entries stored, never compressed, data aligned to 64 bytes.
//
// One entry:  local header (30 bytes, name, extra fields), the data, optionally a data descriptor.
// At the end: the central directory (46 bytes, name, extra and comment for each entry), then the
// end record; beyond 4 GB or 65,535 entries a zip64 end record and its locator before that.
// Sizes come from the central directory (PyTorch leaves them 0 in local headers); the place of the
// data from the local header, whose name and extra lengths differ from the directory's.
// Source: PKWARE APPNOTE.TXT 6.3; PyTorch caffe2/serialize/inline_container.cc (the padding field).
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "data/atomic_file.h"

namespace rwkv {

struct ZipEntry {
  std::string_view name;  // points into the file
  uint16_t flags = 0;
  uint16_t method = 0;  // 0: stored
  uint32_t crc = 0;
  uint64_t stored_bytes = 0;
  uint64_t header_offset = 0;
};

// A view of a zip file's bytes, which must outlive it.
class ZipArchive {
 public:
  // Reads the central directory. Throws std::runtime_error, starting with `path`, if it is absent
  // (a cut file), damaged, points outside the file, or names an entry twice.
  ZipArchive(std::span<const std::byte> file, std::string path);

  // In the order of the directory.
  const std::vector<ZipEntry>& entries() const { return entries_; }
  // Null if there is none of that name.
  const ZipEntry* find(std::string_view name) const;
  // The entry's bytes, in place. Throws std::runtime_error if the entry is compressed or encrypted
  // (in the directory or by its local header), lies outside the file, or lies where the local
  // header has another name. The checksum is left alone: it would read gigabytes of weights.
  std::span<const std::byte> data(const ZipEntry& entry) const;
  // Reads the entry's bytes and throws std::runtime_error if they do not match the checksum. One of
  // 0 is none: so PyTorch writes it where it was told to leave checksums out.
  void verify(const ZipEntry& entry) const;

 private:
  struct Directory {
    uint64_t entry_count = 0;
    uint64_t bytes = 0;
    uint64_t offset = 0;
  };
  Directory find_directory() const;
  Directory read_zip64_directory(uint64_t locator_offset) const;
  void read_entries(const Directory& directory);
  void index_names();
  void require_plain(std::string_view name, uint16_t method, uint16_t flags) const;
  [[noreturn]] void fail(const std::string& what) const;

  std::span<const std::byte> file_;
  std::string path_;
  uint64_t directory_offset_ = 0;
  std::vector<ZipEntry> entries_;
  std::vector<uint32_t> by_name_;  // indices of entries_, sorted by name
};

// Writes entries one after the other; the same entries give the same bytes.
class ZipWriter {
 public:
  static constexpr uint64_t kAlignment = 64;

  // Sizes and offsets of `zip64_from` and more are written as zip64. The format's own limit is the
  // default; a smaller one serves tests, which cannot write 4 GB each time.
  explicit ZipWriter(AtomicFile& file, uint64_t zip64_from = std::numeric_limits<uint32_t>::max());
  // Data starts at a multiple of kAlignment in the file. Reads `data` twice: for the checksum,
  // which stands before it, and to write it.
  void add(std::string_view name, std::span<const std::byte> data);
  void add(std::string_view name, std::string_view text);
  // Writes the central directory; nothing may be added after. The file is not committed.
  void finish();

 private:
  struct Written {
    std::string name;
    uint32_t crc = 0;
    uint64_t bytes = 0;
    uint64_t header_offset = 0;
  };
  std::string directory_record(const Written& entry) const;

  AtomicFile& file_;
  uint64_t zip64_from_;
  std::vector<Written> written_;
};

// CRC-32 of zip files.
uint32_t crc32_of(std::span<const std::byte> data);

}  // namespace rwkv
