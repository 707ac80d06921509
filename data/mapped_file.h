// A file mapped read-only into memory for as long as the object lives. If the file becomes shorter
// meanwhile, reading what is gone ends the program (data/mapping_guard.h says how).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace rwkv {

// Movable, not copyable. Reading it from several threads is safe.
class MappedFile {
 public:
  // Throws std::runtime_error naming the path and the system's reason if the file cannot be opened,
  // is not a regular file, or cannot be mapped. An empty file maps to an empty span.
  explicit MappedFile(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  std::string path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace rwkv
