// Protobuf messages as their bytes: the fields of one, and appending fields to one. Not the
// library: Debian's libsentencepiece carries another release of it under the same names, and a
// program that links both crashes. Source: protobuf.dev/programming-guides/encoding.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace rwkv {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they are");

// The bytes are no message. Whoever knows the file says which.
struct MalformedMessage : std::runtime_error {
  MalformedMessage() : std::runtime_error("malformed protobuf message") {}
};

// Walks the fields of a message, which must outlive it. Allocates nothing.
class MessageReader {
 public:
  explicit MessageReader(std::string_view message) : rest_(message) {}

  struct Field {
    uint64_t number = 0;
    uint64_t value = 0;      // of a varint; the bits of a 64-bit or 32-bit number
    std::string_view bytes;  // of a field with a length (a string, a message), or of the number

    double as_double() const { return std::bit_cast<double>(value); }
    float as_float() const { return std::bit_cast<float>(static_cast<uint32_t>(value)); }
  };
  // False at the end of the message. Throws MalformedMessage.
  bool next(Field& field) {
    if (rest_.empty()) {
      return false;
    }
    const uint64_t tag = varint();
    field = {tag >> 3, 0, {}};
    switch (tag & 7) {
      case 0:
        field.value = varint();
        break;
      case 1:
        take_number(field, 8);
        break;
      case 2:
        field.bytes = take(varint());
        break;
      case 5:
        take_number(field, 4);
        break;
      default:
        throw MalformedMessage();
    }
    return true;
  }

 private:
  std::string_view take(uint64_t length) {
    if (length > rest_.size()) {
      throw MalformedMessage();
    }
    const std::string_view taken = rest_.substr(0, length);
    rest_.remove_prefix(length);
    return taken;
  }

  void take_number(Field& field, size_t length) {
    field.bytes = take(length);
    std::memcpy(&field.value, field.bytes.data(), length);
  }

  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(1)[0]);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) {
        return value;
      }
    }
    throw MalformedMessage();
  }

  std::string_view rest_;
};

// A message that is being written; fields follow each other in the order of the calls.
class MessageWriter {
 public:
  void integer(uint32_t number, int64_t value) {
    varint(number << 3);
    varint(static_cast<uint64_t>(value));
  }
  void real(uint32_t number, double value) {
    varint(number << 3 | 1);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void real(uint32_t number, float value) {
    varint(number << 3 | 5);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  // A string, or a message within this one.
  void bytes(uint32_t number, std::string_view value) {
    varint(number << 3 | 2);
    varint(value.size());
    bytes_.append(value);
  }
  const std::string& message() const { return bytes_; }

 private:
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) {
      bytes_ += static_cast<char>(value | 0x80);
    }
    bytes_ += static_cast<char>(value);
  }

  std::string bytes_;
};

}  // namespace rwkv
