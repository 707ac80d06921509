// Files that are complete or absent: written aside, made durable, then renamed into place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>

namespace rwkv {

// Writes `path` under another name in the same folder, `path` + ".partial", locked against other
// writers. commit() makes it durable and renames it; an object destroyed without commit() removes
// what it wrote. What a killed writer left is taken over by the next writer of the same path.
// Every failure (a full disk, a read-only folder, another writer at work) throws std::runtime_error
// with path and reason.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();

  const std::string& path() const { return path_; }
  uint64_t size() const { return written_; }
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text) { write(std::as_bytes(std::span(text.data(), text.size()))); }
  // Brings all that was written to the disk: after it, commit() can hardly fail.
  void prepare();
  // prepare(), then renames into place and fsyncs the folder. Call at most once.
  void commit();

 private:
  void open_partial();
  void flush();
  void write_through(std::span<const std::byte> bytes);
  [[noreturn]] void fail(const char* what) const;

  std::string path_;
  std::string partial_path_;
  std::string buffer_;
  int fd_ = -1;
  uint64_t written_ = 0;
  uint64_t handed_over_ = 0;  // of them, to the system
  uint64_t begun_ = 0;        // of those, on their way to the disk
};

// Reads a whole small file (a vocabulary, a configuration). Throws std::runtime_error with path and
// reason, also for one of more than `max_bytes`: by mistake somebody may name a file of any size.
std::string read_text_file(const std::string& path,
                           uint64_t max_bytes = std::numeric_limits<uint64_t>::max());
// Why the system call before failed, by errno, as an error text says it: with what to do if the
// disk is full or a file may not grow.
std::string reason_of_failure();
// Makes a rename inside `folder` survive a power cut. Throws std::runtime_error.
void sync_folder(const std::string& folder);

}  // namespace rwkv
