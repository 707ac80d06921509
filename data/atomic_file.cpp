#include "data/atomic_file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include <fcntl.h>
#include <unistd.h>

#include "data/mapped_file.h"
#include "data/number_text.h"

namespace rwkv {
namespace {

// Large enough that small writes cost no system call each.
constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), partial_path_(path_ + ".partial-" + std::to_string(::getpid())) {
  fd_ = ::open(partial_path_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) {
    throw std::runtime_error(path_ + ": cannot be created: " + std::strerror(errno) +
                             "; is its folder there, and writable?");
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    ::close(fd_);
    ::unlink(partial_path_.c_str());
  }
}

void AtomicFile::fail(const char* what) {
  throw std::runtime_error(path_ + ": " + what + " after " + std::to_string(written_) +
                           " bytes: " + std::strerror(errno) + "; nothing was left behind");
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  written_ += bytes.size();
  // In pieces: the tensors of a checkpoint are gigabytes, and the buffer must not grow with them.
  while (!bytes.empty()) {
    const auto piece = bytes.first(std::min(bytes.size(), kBufferBytes));
    bytes = bytes.subspan(piece.size());
    buffer_.append(reinterpret_cast<const char*>(piece.data()), piece.size());
    if (buffer_.size() >= kBufferBytes) {
      flush();
    }
  }
}

void AtomicFile::flush() {
  size_t done = 0;
  while (done < buffer_.size()) {
    const ssize_t n = ::write(fd_, buffer_.data() + done, buffer_.size() - done);
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      fail("writing failed");
    }
    done += static_cast<size_t>(n);
  }
  buffer_.clear();
}

void AtomicFile::commit() {
  flush();
  if (::fsync(fd_) != 0) {
    fail("fsync failed");
  }
  const int fd = fd_;
  if (::rename(partial_path_.c_str(), path_.c_str()) != 0) {
    fail("renaming into place failed");
  }
  fd_ = -1;
  if (::close(fd) != 0) {
    fail("closing failed");
  }
  const std::string folder = std::filesystem::path(path_).parent_path().string();
  sync_folder(folder.empty() ? "." : folder);
}

std::string read_text_file(const std::string& path, uint64_t max_bytes) {
  const MappedFile file(path);
  if (file.bytes().size() > max_bytes) {
    throw std::runtime_error(path + ": has " + grouped(file.bytes().size()) +
                             " bytes, expected at most " + grouped(max_bytes) +
                             "; is it the right file?");
  }
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

void sync_folder(const std::string& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) {
    throw std::runtime_error(folder + ": cannot be opened: " + std::strerror(errno));
  }
  const int result = ::fsync(fd);
  const int reason = errno;
  ::close(fd);
  // Some file systems have no fsync of a folder and say EINVAL: there is nothing more to do there.
  if (result != 0 && reason != EINVAL) {
    throw std::runtime_error(folder + ": fsync failed: " + std::strerror(reason));
  }
}

}  // namespace rwkv
