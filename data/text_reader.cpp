#include "data/text_reader.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include <simdjson.h>
#include <sys/stat.h>

#include "data/byte_source.h"
#include "data/number_text.h"

namespace rwkv {
namespace {

constexpr size_t kPieceBytes = size_t{1} << 20;
constexpr uint64_t kLongestRow = 4'294'967'000;
constexpr std::string_view kByteOrderMark = "\xEF\xBB\xBF";

enum class TextKind { kPlain, kJsonl };

struct FileKind {
  std::string_view ending;
  TextKind text;
  Compression compression;
};

constexpr FileKind kFileKinds[] = {
    {".txt", TextKind::kPlain, Compression::kNone},
    {".txt.gz", TextKind::kPlain, Compression::kGzip},
    {".txt.zst", TextKind::kPlain, Compression::kZstd},
    {".jsonl", TextKind::kJsonl, Compression::kNone},
    {".jsonl.gz", TextKind::kJsonl, Compression::kGzip},
    {".jsonl.zst", TextKind::kJsonl, Compression::kZstd},
};

const FileKind& kind_of(const std::string& path) {
  std::string endings;
  for (const FileKind& kind : kFileKinds) {
    if (path.ends_with(kind.ending)) {
      return kind;
    }
    endings.append(endings.empty() ? "" : ", ").append(kind.ending);
  }
  throw std::invalid_argument(path +
                              ": its name does not say what kind of text it holds; expected " +
                              "one that ends in one of " + endings);
}

uint64_t size_of(const std::string& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) {
    throw std::runtime_error(path + ": cannot be opened: " + std::strerror(errno));
  }
  if (!S_ISREG(status.st_mode)) {
    throw std::runtime_error(path + ": is " +
                             (S_ISDIR(status.st_mode) ? "a directory" : "not a regular file") +
                             ", expected a file; give the path of a file");
  }
  return static_cast<uint64_t>(status.st_size);
}

std::string describe(simdjson::dom::element_type type) {
  switch (type) {
    case simdjson::dom::element_type::ARRAY:
      return "an array";
    case simdjson::dom::element_type::OBJECT:
      return "an object";
    case simdjson::dom::element_type::STRING:
      return "a string";
    case simdjson::dom::element_type::BOOL:
      return "true or false";
    case simdjson::dom::element_type::NULL_VALUE:
      return "null";
    default:
      return "a number";
  }
}

// The keys of a row, for an error text; a row may have hundreds.
std::string list_keys(simdjson::dom::object row) {
  constexpr size_t kMostKeys = 8;
  std::string list;
  size_t count = 0;
  for (const auto field : row) {
    if (++count > kMostKeys) {
      return list + ", ...";
    }
    list.append(count == 1 ? "\"" : ", \"").append(field.key).append("\"");
  }
  return count == 0 ? "no key at all" : list;
}

}  // namespace

struct TextReader::Impl {
  Impl(std::vector<std::string> paths, Options options);
  bool next(TextPiece& piece);

  // Opens the next file; false if there is none.
  bool open_next();
  void close();
  bool next_plain(TextPiece& piece);
  bool next_row(TextPiece& piece);
  // Puts the next line into row_, without its newline; false at the end of the file.
  bool read_line();
  // Text of row_, valid until the next row.
  std::string_view parse_row();
  void read_ahead();
  [[noreturn]] void fail_row(const std::string& what) const;

  std::vector<std::string> paths_;
  Options options_;
  uint64_t bytes_total_ = 0;
  uint64_t closed_bytes_ = 0;  // of the files that are done
  size_t next_path_ = 0;
  const FileKind* kind_ = nullptr;
  std::unique_ptr<ByteSource> source_;
  // ahead_ is what has been read and not handed out. A .txt piece is handed out of current_ while
  // ahead_ already holds the bytes after it: their absence is what makes it the last.
  std::string current_;
  std::string ahead_;
  size_t ahead_begin_ = 0;
  std::string row_;
  uint64_t line_ = 0;
  simdjson::dom::parser parser_;
};

TextReader::Impl::Impl(std::vector<std::string> paths, Options options)
    : paths_(std::move(paths)), options_(std::move(options)) {
  if (paths_.empty()) {
    throw std::invalid_argument("no text files were given; expected one or more");
  }
  if (options_.max_row_bytes < 1 || options_.max_row_bytes > kLongestRow) {
    throw std::invalid_argument("max_row_bytes = " + std::to_string(options_.max_row_bytes) +
                                "; expected 1 to " + std::to_string(kLongestRow));
  }
  for (const std::string& path : paths_) {
    const FileKind& kind = kind_of(path);
    bytes_total_ += size_of(path);
    open_byte_source(path, kind.compression);
  }
}

bool TextReader::Impl::open_next() {
  if (next_path_ == paths_.size()) {
    return false;
  }
  kind_ = &kind_of(paths_[next_path_]);
  source_ = open_byte_source(paths_[next_path_], kind_->compression);
  ++next_path_;
  line_ = 0;
  read_ahead();
  ahead_begin_ = ahead_.starts_with(kByteOrderMark) ? kByteOrderMark.size() : 0;
  return true;
}

void TextReader::Impl::close() {
  closed_bytes_ += source_->bytes_read();
  source_.reset();
}

void TextReader::Impl::read_ahead() {
  ahead_.resize(kPieceBytes);
  ahead_.resize(source_->read(ahead_));
  ahead_begin_ = 0;
}

bool TextReader::Impl::next(TextPiece& piece) {
  while (source_ != nullptr || open_next()) {
    if (kind_->text == TextKind::kPlain ? next_plain(piece) : next_row(piece)) {
      return true;
    }
    close();
  }
  return false;
}

bool TextReader::Impl::next_plain(TextPiece& piece) {
  if (ahead_begin_ == ahead_.size()) {
    // Only a byte order mark, or nothing: the bytes after a first piece are read below.
    return false;
  }
  std::swap(current_, ahead_);
  const size_t begin = ahead_begin_;
  read_ahead();
  piece.text = std::string_view(current_).substr(begin);
  piece.ends_document = ahead_.empty();
  return true;
}

bool TextReader::Impl::next_row(TextPiece& piece) {
  while (read_line()) {
    if (row_.find_first_not_of(" \t\r") == std::string::npos) {
      continue;
    }
    const std::string_view text = parse_row();
    if (!text.empty()) {
      piece = {text, true};
      return true;
    }
  }
  return false;
}

bool TextReader::Impl::read_line() {
  row_.clear();
  ++line_;
  for (;;) {
    const std::string_view rest = std::string_view(ahead_).substr(ahead_begin_);
    const size_t length = rest.find('\n');
    const bool found = length != std::string_view::npos;
    row_.append(rest.substr(0, length));
    if (row_.size() > options_.max_row_bytes) {
      fail_row("the row is longer than " + grouped(options_.max_row_bytes) +
               " bytes; expected one JSON object a line; does the file have line ends?");
    }
    if (found) {
      ahead_begin_ += length + 1;
      return true;
    }
    if (!ahead_.empty()) {
      read_ahead();
    }
    if (ahead_.empty()) {
      return !row_.empty();
    }
  }
}

std::string_view TextReader::Impl::parse_row() {
  // simdjson reads, and does not use, some bytes past the end.
  const size_t length = row_.size();
  row_.resize(length + simdjson::SIMDJSON_PADDING);
  simdjson::dom::element element;
  const simdjson::error_code error = parser_.parse(row_.data(), length, false).get(element);
  if (error == simdjson::UTF8_ERROR) {
    fail_row("the row is not valid UTF-8; expected UTF-8; convert the file");
  }
  if (error != simdjson::SUCCESS) {
    fail_row(std::string("not JSON: ") + simdjson::error_message(error) +
             "; expected one JSON object a line");
  }
  simdjson::dom::object object;
  if (element.get(object) != simdjson::SUCCESS) {
    fail_row("the row is " + describe(element.type()) + "; expected an object such as {\"" +
             options_.jsonl_key + "\": \"...\"}");
  }
  bool found = false;
  simdjson::dom::element value;
  for (const auto field : object) {
    if (field.key == options_.jsonl_key) {
      if (found) {
        fail_row("has the key \"" + options_.jsonl_key + "\" twice; expected it once");
      }
      value = field.value;
      found = true;
    }
  }
  if (!found) {
    fail_row("has no key \"" + options_.jsonl_key + "\", but " + list_keys(object) +
             "; say which key holds the text");
  }
  std::string_view text;
  if (value.get(text) != simdjson::SUCCESS) {
    fail_row("\"" + options_.jsonl_key + "\" is " + describe(value.type()) + "; expected a string");
  }
  return text;
}

void TextReader::Impl::fail_row(const std::string& what) const {
  throw std::runtime_error(paths_[next_path_ - 1] + ":" + std::to_string(line_) + ": " + what);
}

TextReader::TextReader(std::vector<std::string> paths, Options options)
    : impl_(std::make_unique<Impl>(std::move(paths), std::move(options))) {}

TextReader::~TextReader() = default;

bool TextReader::next(TextPiece& piece) {
  return impl_->next(piece);
}

const std::string& TextReader::path() const {
  return impl_->paths_[impl_->next_path_ - 1];
}

uint64_t TextReader::bytes_read() const {
  return impl_->closed_bytes_ + (impl_->source_ != nullptr ? impl_->source_->bytes_read() : 0);
}

uint64_t TextReader::bytes_total() const {
  return impl_->bytes_total_;
}

}  // namespace rwkv
