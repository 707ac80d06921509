#include "data/mapped_file.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/mapping_guard.h"

namespace rwkv {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Without O_NONBLOCK a pipe would wait for somebody to write before it is known to be one.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
  }
  struct stat status {};
  if (::fstat(fd, &status) != 0) {
    const int reason = errno;
    ::close(fd);
    throw std::runtime_error(path + ": cannot be examined: " + std::strerror(reason));
  }
  if (!S_ISREG(status.st_mode)) {
    ::close(fd);
    throw std::runtime_error(path + ": is " +
                             (S_ISDIR(status.st_mode) ? "a directory" : "not a regular file") +
                             ", expected a file; give the path of a file");
  }
  size_ = static_cast<size_t>(status.st_size);
  if (size_ > 0) {
    void* mapped = ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
      const int reason = errno;
      ::close(fd);
      throw std::runtime_error(path + ": cannot be mapped: " + std::strerror(reason));
    }
    data_ = static_cast<const std::byte*>(mapped);
    remember_mapping(data_, size_, path);
  }
  ::close(fd);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)),
      data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) {
    forget_mapping(data_);
    ::munmap(const_cast<std::byte*>(data_), size_);
  }
}

}  // namespace rwkv
