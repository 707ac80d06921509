#include "data/byte_source.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <vector>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

#include "data/number_text.h"

namespace rwkv {
namespace {

constexpr size_t kInputBytes = size_t{1} << 18;
// Powers of two. The first is what `zstd -d` takes without being asked, the second the format's
// end.
constexpr int kFreeWindowLog = 27;
constexpr int kMaxWindowLog = 31;
// Text seldom becomes smaller than this part by compression.
constexpr uint64_t kMostRatio = 16;

class PlainSource : public ByteSource {
 public:
  explicit PlainSource(const std::string& path) : path_(path) {
    fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) {
      throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
    }
  }
  PlainSource(const PlainSource&) = delete;
  PlainSource& operator=(const PlainSource&) = delete;
  ~PlainSource() override { ::close(fd_); }

  size_t read(std::span<char> out) override {
    size_t done = 0;
    while (done < out.size()) {
      const ssize_t n = ::read(fd_, out.data() + done, out.size() - done);
      if (n < 0 && errno == EINTR) {
        continue;
      }
      if (n < 0) {
        throw std::runtime_error(path_ + ": reading failed after " + grouped(bytes_read_) +
                                 " bytes: " + std::strerror(errno));
      }
      if (n == 0) {
        break;
      }
      done += static_cast<size_t>(n);
      bytes_read_ += static_cast<uint64_t>(n);
    }
    return done;
  }
  uint64_t bytes_read() const override { return bytes_read_; }
  uint64_t file_bytes() const {
    struct stat status {};
    return ::fstat(fd_, &status) == 0 ? static_cast<uint64_t>(status.st_size) : 0;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
  uint64_t bytes_read_ = 0;
};

// What gzip and zstd have in common: compressed bytes in, units (members, frames) that may follow
// one another, and an end of the file that is right only between two units.
class CompressedSource : public ByteSource {
 public:
  uint64_t bytes_read() const override { return file_.bytes_read(); }

  size_t read(std::span<char> out) final {
    size_t done = 0;
    while (done < out.size()) {
      if (begin_ == end_) {
        begin_ = 0;
        end_ = file_.read(input_);
      }
      // With no input left a decoder may still hold output; only when it gives none is it over.
      const bool at_end = begin_ == end_;
      if (at_end && between_units_) {
        if (bytes_read() == 0) {
          fail("the file is empty");
        }
        break;
      }
      const size_t produced = decode(out.subspan(done));
      if (at_end && produced == 0 && !between_units_) {
        fail("the compressed stream ends early; the copy looks cut short");
      }
      done += produced;
    }
    return done;
  }

 protected:
  explicit CompressedSource(const std::string& path) : file_(path), input_(kInputBytes) {}

  // Decodes from input() into `out`, tells what it took through take(), sets between_units_, and
  // returns the number of bytes written.
  virtual size_t decode(std::span<char> out) = 0;

  uint64_t file_bytes() const { return file_.file_bytes(); }
  std::span<char> input() { return std::span(input_).subspan(begin_, end_ - begin_); }
  void take(size_t bytes) { begin_ += bytes; }
  [[noreturn]] void fail(const std::string& reason) const {
    throw std::runtime_error(file_.path() + ": " + reason + " (after " + grouped(bytes_read()) +
                             " bytes read)");
  }

  bool between_units_ = true;

 private:
  PlainSource file_;
  std::vector<char> input_;
  size_t begin_ = 0;
  size_t end_ = 0;
};

class GzipSource : public CompressedSource {
 public:
  explicit GzipSource(const std::string& path) : CompressedSource(path) {
    // 15 bits of window, plus 16: a gzip header and no other.
    if (::inflateInit2(&stream_, 15 + 16) != Z_OK) {
      throw std::runtime_error(path + ": zlib cannot be started");
    }
  }
  GzipSource(const GzipSource&) = delete;
  GzipSource& operator=(const GzipSource&) = delete;
  ~GzipSource() override { ::inflateEnd(&stream_); }

 private:
  size_t decode(std::span<char> out) override {
    if (between_units_) {
      ::inflateReset(&stream_);
    }
    constexpr size_t kMost = size_t{1} << 30;  // zlib counts in 32 bits
    out = out.first(std::min(out.size(), kMost));
    const std::span<char> in = input();
    stream_.next_in = reinterpret_cast<Bytef*>(in.data());
    stream_.avail_in = static_cast<uInt>(in.size());
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    stream_.avail_out = static_cast<uInt>(out.size());
    const int result = ::inflate(&stream_, Z_NO_FLUSH);
    // Z_BUF_ERROR: no progress was possible; read() knows whether there is more to come.
    if (result != Z_OK && result != Z_STREAM_END && result != Z_BUF_ERROR) {
      fail(std::string("the gzip stream is corrupt: ") +
           (stream_.msg != nullptr ? stream_.msg : ::zError(result)));
    }
    take(in.size() - stream_.avail_in);
    between_units_ = result == Z_STREAM_END;
    return out.size() - stream_.avail_out;
  }

  z_stream stream_{};
};

class ZstdSource : public CompressedSource {
 public:
  explicit ZstdSource(const std::string& path)
      : CompressedSource(path), stream_(::ZSTD_createDStream(), &::ZSTD_freeDStream) {
    const int window_log =
        std::clamp(static_cast<int>(std::bit_width(file_bytes() * kMostRatio)) - 1,
                   kFreeWindowLog,
                   kMaxWindowLog);
    if (stream_ == nullptr || ::ZSTD_isError(::ZSTD_DCtx_setParameter(
                                  stream_.get(), ZSTD_d_windowLogMax, window_log)) != 0) {
      throw std::runtime_error(path + ": zstd cannot be started");
    }
  }

 private:
  size_t decode(std::span<char> out) override {
    const std::span<char> in = input();
    ZSTD_inBuffer from{in.data(), in.size(), 0};
    ZSTD_outBuffer to{out.data(), out.size(), 0};
    const size_t result = ::ZSTD_decompressStream(stream_.get(), &to, &from);
    if (::ZSTD_getErrorCode(result) == ZSTD_error_frameParameter_windowTooLarge) {
      fail("the zstd stream wants a window far larger than a file of " + grouped(file_bytes()) +
           " bytes can use; compress it again without --long");
    }
    if (::ZSTD_isError(result) != 0) {
      fail(std::string("the zstd stream is corrupt: ") + ::ZSTD_getErrorName(result));
    }
    take(from.pos);
    between_units_ = result == 0;
    return to.pos;
  }

  std::unique_ptr<ZSTD_DStream, size_t (*)(ZSTD_DStream*)> stream_;
};

}  // namespace

std::unique_ptr<ByteSource> open_byte_source(const std::string& path, Compression compression) {
  switch (compression) {
    case Compression::kGzip:
      return std::make_unique<GzipSource>(path);
    case Compression::kZstd:
      return std::make_unique<ZstdSource>(path);
    case Compression::kNone:
      break;
  }
  return std::make_unique<PlainSource>(path);
}

}  // namespace rwkv
