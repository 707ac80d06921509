#include "data/atomic_file.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <utility>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/mapped_file.h"
#include "data/number_text.h"

namespace rwkv {
namespace {

// Large enough that small writes cost no system call each.
constexpr size_t kBufferBytes = size_t{1} << 18;
// The disk begins with what was written whenever there is as much of it: else all would rest until
// fsync, and a checkpoint of a gigabyte took 1.3 times as long.
constexpr uint64_t kDiskBytes = uint64_t{1} << 24;

}  // namespace

AtomicFile::AtomicFile(std::string path)
    : path_(std::move(path)), partial_path_(path_ + ".partial") {
  open_partial();
  // What a killed writer left.
  struct stat status {};
  if (::fstat(fd_, &status) == 0 && status.st_size > 0 && ::ftruncate(fd_, 0) != 0) {
    fail("removing what an earlier writer left failed");
  }
}

void AtomicFile::open_partial() {
  for (;;) {
    fd_ = ::open(partial_path_.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) {
      throw std::runtime_error(path_ + ": cannot be created: " + reason_of_failure() +
                               "; is its folder there, and writable?");
    }
    // The lock goes with the program that holds it. Where a file system has no locks (any other
    // error), we do without.
    if (::flock(fd_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(std::exchange(fd_, -1));
      throw std::runtime_error(path_ + ": is being written by another program, which holds " +
                               partial_path_ + "; wait for it, or write to another path");
    }
    // Between open and lock, the writer before us may have renamed or removed this very file.
    struct stat opened {};
    struct stat named {};
    if (::fstat(fd_, &opened) != 0 ||
        (::stat(partial_path_.c_str(), &named) == 0 && opened.st_dev == named.st_dev &&
         opened.st_ino == named.st_ino)) {
      return;
    }
    ::close(std::exchange(fd_, -1));
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) {
    // In this order: once it is closed, and so unlocked, another writer may have it.
    ::unlink(partial_path_.c_str());
    ::close(fd_);
  }
}

void AtomicFile::fail(const char* what) const {
  throw std::runtime_error(path_ + ": " + what + " after " + grouped(written_) +
                           " bytes: " + reason_of_failure() + "; nothing was left behind");
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  written_ += bytes.size();
  if (bytes.size() >= kBufferBytes) {
    // The tensors of a checkpoint are gigabytes: they are not copied once more.
    flush();
    write_through(bytes);
    return;
  }
  buffer_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (buffer_.size() >= kBufferBytes) {
    flush();
  }
}

void AtomicFile::flush() {
  write_through(std::as_bytes(std::span(buffer_)));
  buffer_.clear();
}

void AtomicFile::write_through(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) {
      continue;
    }
    if (n < 0) {
      fail("writing failed");
    }
    bytes = bytes.subspan(static_cast<size_t>(n));
    handed_over_ += static_cast<uint64_t>(n);
  }
  if (handed_over_ - begun_ >= kDiskBytes) {
    // It waits for nothing, and where a file system has no such call, fsync does it all: whatever
    // fails on the disk is fsync's to say.
    ::sync_file_range(fd_,
                      static_cast<off64_t>(begun_),
                      static_cast<off64_t>(handed_over_ - begun_),
                      SYNC_FILE_RANGE_WRITE);
    begun_ = handed_over_;
  }
}

void AtomicFile::prepare() {
  flush();
  if (::fsync(fd_) != 0) {
    fail("fsync failed");
  }
}

void AtomicFile::commit() {
  prepare();
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

std::string reason_of_failure() {
  const int error = errno;
  const std::string reason = std::strerror(error);
  switch (error) {
    case ENOSPC:
      return reason + " (the disk is full; make room, or write elsewhere)";
    case EDQUOT:
      return reason + " (your share of the disk is full; make room, or write elsewhere)";
    case EFBIG:
      return reason + " (a limit on the size of files is reached; see ulimit -f)";
    case EROFS:
      return reason + " (write elsewhere)";
    default:
      return reason;
  }
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
