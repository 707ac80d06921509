// The bytes of a file as they were before compression, as a stream.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace rwkv {

enum class Compression { kNone, kGzip, kZstd };

// Not safe for several threads.
class ByteSource {
 public:
  virtual ~ByteSource() = default;
  // Fills `out` as far as the file goes and returns the number of bytes; fewer than out.size() only
  // at the end. Throws std::runtime_error "FILE: ..." if the file cannot be read, or if a
  // compressed stream is corrupt or ends early.
  virtual size_t read(std::span<char> out) = 0;
  // Bytes taken from the disk so far.
  virtual uint64_t bytes_read() const = 0;
};

// gzip members and zstd frames may follow one another; the bytes of all are given. An empty file is
// no gzip or zstd stream. zstd windows of up to 128 MiB are accepted, and in a file of W bytes
// those of up to 16 * W, at most 2 GiB (`zstd --long=31`): a window is memory, and a small file has
// no use for a large one. Throws std::runtime_error naming path and reason if the file cannot be
// opened.
std::unique_ptr<ByteSource> open_byte_source(const std::string& path, Compression compression);

}  // namespace rwkv
