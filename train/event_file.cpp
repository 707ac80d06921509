#include "train/event_file.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <unistd.h>

#include "data/protobuf_message.h"
#include "data/utf8.h"

namespace rwkv {
namespace {

constexpr std::string_view kFilePrefix = "events.out.tfevents.";
constexpr std::string_view kFileVersion = "brain.Event:2";
constexpr std::string_view kTextPlugin = "text";

// Values of TensorBoard's enumerations.
constexpr uint64_t kFloat = 1;
constexpr uint64_t kDouble = 2;
constexpr int64_t kString = 7;
constexpr int64_t kTensorClass = 2;
constexpr int64_t kSessionStart = 1;

constexpr size_t kLengthBytes = sizeof(uint64_t);
constexpr size_t kChecksumBytes = sizeof(uint32_t);
constexpr size_t kHeaderBytes = kLengthBytes + kChecksumBytes;
constexpr size_t kBufferBytes = size_t{1} << 14;

constexpr std::array<uint32_t, 256> make_crc_table() {
  constexpr uint32_t kCastagnoli = 0x82f63b78;  // reversed
  std::array<uint32_t, 256> table{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) {
      value = (value >> 1) ^ ((value & 1) != 0 ? kCastagnoli : 0);
    }
    table[i] = value;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = make_crc_table();

uint32_t masked_crc32c(std::string_view bytes) {
  uint32_t crc = 0xffffffff;
  for (const char c : bytes) {
    crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  }
  return std::rotr(~crc, 15) + 0xa282ead8;
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

template <typename T>
T load(std::string_view bytes) {
  T value;
  std::memcpy(&value, bytes.data(), sizeof(value));
  return value;
}

template <typename T>
void append(std::string& buffer, T value) {
  buffer.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string as_code_block(std::string_view text) {
  std::string block;
  while (true) {
    const size_t end = text.find('\n');
    block.append("    ").append(text.substr(0, end));
    if (end == text.npos) {
      return block;
    }
    block += '\n';
    text.remove_prefix(end + 1);
  }
}

// The time in the name of an event file, or 0.
int64_t time_in(const std::string& name) {
  int64_t time = 0;
  if (name.starts_with(kFilePrefix)) {
    const char* const begin = name.data() + kFilePrefix.size();
    std::from_chars(begin, name.data() + name.size(), time);
  }
  return time;
}

std::string new_path(const std::string& folder, double time_s) {
  // Beyond that a clock is wrong, and the conversion would not be defined.
  constexpr double kLastTime = 1e15;
  auto time = static_cast<int64_t>(std::clamp(time_s, 0.0, kLastTime));
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    time = std::max(
        time,
        std::min(time_in(entry.path().filename().string()), static_cast<int64_t>(kLastTime)) + 1);
  }
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0 || host[0] == '\0') {
    std::strcpy(host.data(), "localhost");
  }
  return (std::filesystem::path(folder) / (std::string(kFilePrefix) + std::to_string(time) + "." +
                                           host.data() + "." + std::to_string(::getpid())))
      .string();
}

MessageWriter begin_event(double time_s, int64_t step) {
  MessageWriter event;
  event.real(1, time_s);
  event.integer(2, step);
  return event;
}

std::string summary_event(double time_s, int64_t step, const MessageWriter& value) {
  MessageWriter summary;
  summary.bytes(1, value.message());
  MessageWriter event = begin_event(time_s, step);
  event.bytes(5, summary.message());
  return event.message();
}

std::string text_metadata() {
  MessageWriter plugin;
  plugin.bytes(1, kTextPlugin);
  MessageWriter metadata;
  metadata.bytes(1, plugin.message());
  metadata.integer(4, kTensorClass);
  return metadata.message();
}

// A vector of one string.
std::string text_tensor(std::string_view text) {
  MessageWriter dim;
  dim.integer(1, 1);
  MessageWriter shape;
  shape.bytes(2, dim.message());
  MessageWriter tensor;
  tensor.integer(1, kString);
  tensor.bytes(2, shape.message());
  tensor.bytes(8, text);
  return tensor.message();
}

void read_tensor(std::string_view message, EventValue& value) {
  uint64_t dtype = 0;
  std::string_view numbers;
  MessageReader tensor(message);
  for (MessageReader::Field field; tensor.next(field);) {
    if (field.number == 1) {
      dtype = field.value;
    } else if (field.number == 4 || field.number == 5 || field.number == 6) {
      // A repeated number comes bare or packed: the bytes are the same.
      numbers = field.bytes;
    } else if (field.number == 8 && !value.text) {
      value.text = field.bytes;
    }
  }
  if (dtype == kFloat && numbers.size() == sizeof(float)) {
    value.scalar = load<float>(numbers);
  } else if (dtype == kDouble && numbers.size() == sizeof(double)) {
    value.scalar = load<double>(numbers);
  }
}

void add_value(std::string_view message, Event& event) {
  EventValue value;
  MessageReader reader(message);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      value.tag = field.bytes;
    } else if (field.number == 2) {
      value.scalar = field.as_float();
    } else if (field.number == 8) {
      read_tensor(field.bytes, value);
    }
  }
  if (!value.tag.empty()) {
    event.values.push_back(std::move(value));
  }
}

Event read_event(std::string_view message) {
  Event event;
  MessageReader reader(message);
  for (MessageReader::Field field; reader.next(field);) {
    if (field.number == 1) {
      event.time_s = field.as_double();
    } else if (field.number == 2) {
      event.step = static_cast<int64_t>(field.value);
    } else if (field.number == 3) {
      event.file_version = field.bytes;
    } else if (field.number == 5) {
      MessageReader summary(field.bytes);
      for (MessageReader::Field value; summary.next(value);) {
        if (value.number == 1) {
          add_value(value.bytes, event);
        }
      }
    } else if (field.number == 7) {
      MessageReader session(field.bytes);
      for (MessageReader::Field status; session.next(status);) {
        event.starts_session |= status.number == 1 && status.value == uint64_t{kSessionStart};
      }
    }
  }
  return event;
}

}  // namespace

EventWriter::EventWriter(const std::string& folder, int64_t resumed_step, double time_s) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    throw std::runtime_error(folder + ": the folder cannot be made: " + error.message() +
                             "; is the one above it writable?");
  }
  path_ = new_path(folder, time_s);
  file_.open(path_, std::ios::binary | std::ios::trunc);
  if (!file_) {
    throw std::runtime_error(path_ + ": cannot be created: " + std::strerror(errno) +
                             "; is its folder writable?");
  }
  MessageWriter version;
  version.real(1, time_s);
  version.bytes(3, kFileVersion);
  add_record(version.message());
  MessageWriter session;
  session.integer(1, kSessionStart);
  // With the first step that TensorBoard is to forget of the files before.
  MessageWriter start = begin_event(time_s, resumed_step + 1);
  start.bytes(7, session.message());
  add_record(start.message());
  flush();
}

void EventWriter::scalar(std::string_view tag, int64_t step, double time_s, double value) {
  MessageWriter point;
  point.bytes(1, replace_malformed_utf8(tag));
  point.real(2, static_cast<float>(value));
  add_record(summary_event(time_s, step, point));
}

void EventWriter::text(std::string_view tag, int64_t step, double time_s, std::string_view text) {
  MessageWriter value;
  value.bytes(1, replace_malformed_utf8(tag));
  value.bytes(9, text_metadata());
  value.bytes(8, text_tensor(as_code_block(replace_malformed_utf8(text))));
  add_record(summary_event(time_s, step, value));
}

void EventWriter::add_record(std::string_view bytes) {
  const uint64_t length = bytes.size();
  append(buffer_, length);
  append(buffer_, masked_crc32c({reinterpret_cast<const char*>(&length), sizeof(length)}));
  buffer_.append(bytes);
  append(buffer_, masked_crc32c(bytes));
  if (buffer_.size() >= kBufferBytes) {
    flush();
  }
}

void EventWriter::flush() {
  file_.write(buffer_.data(), static_cast<std::streamsize>(buffer_.size()));
  file_.flush();
  if (!file_) {
    throw std::runtime_error(path_ + ": writing failed: " + std::strerror(errno) +
                             "; is the disk full?");
  }
  buffer_.clear();
}

EventReader::EventReader(const std::string& path) : file_(path), rest_(file_.bytes()) {}

void EventReader::fail(const std::string& what) const {
  throw std::runtime_error(file_.path() + ": at byte " +
                           std::to_string(file_.bytes().size() - rest_.size()) + ": " + what +
                           "; the file is damaged there, or is no event file of TensorBoard");
}

std::optional<Event> EventReader::next() {
  const std::string_view rest = as_text(rest_);
  if (rest.size() < kHeaderBytes) {
    return std::nullopt;
  }
  if (!is_event_file(rest_)) {
    fail("the checksum of a record's length is wrong");
  }
  const auto length = load<uint64_t>(rest);
  if (rest.size() - kHeaderBytes < kChecksumBytes ||
      length > rest.size() - kHeaderBytes - kChecksumBytes) {
    return std::nullopt;
  }
  const std::string_view bytes = rest.substr(kHeaderBytes, length);
  if (load<uint32_t>(rest.substr(kHeaderBytes + length)) != masked_crc32c(bytes)) {
    fail("the checksum of a record of " + std::to_string(length) + " bytes is wrong");
  }
  Event event;
  try {
    event = read_event(bytes);
  } catch (const MalformedMessage&) {
    fail("a record of " + std::to_string(length) + " bytes is no event");
  }
  rest_ = rest_.subspan(kHeaderBytes + length + kChecksumBytes);
  return event;
}

bool is_event_file(std::span<const std::byte> start) {
  const std::string_view header = as_text(start).substr(0, kHeaderBytes);
  return header.size() == kHeaderBytes && load<uint32_t>(header.substr(kLengthBytes)) ==
                                              masked_crc32c(header.substr(0, kLengthBytes));
}

}  // namespace rwkv
