#include "train/config_value.h"

#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>

namespace rwkv {

std::string to_config_text(double value) {
  if (std::isnan(value)) {
    return "nan";
  }
  std::array<char, 32> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  std::string text(buffer.data(), end);
  // TOML would read "3" as an integer.
  if (std::isfinite(value) && text.find_first_of(".e") == std::string::npos) {
    text += ".0";
  }
  return text;
}

std::string to_config_text(int64_t value) {
  return std::to_string(value);
}

std::string to_config_text(std::string_view value) {
  std::string text = "\"";
  for (const char c : value) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (byte < 0x20 || byte == 0x7f) {
      std::array<char, 8> escape{};
      std::snprintf(escape.data(), escape.size(), "\\u%04X", static_cast<unsigned>(byte));
      text += escape.data();
    } else {
      text += c;
    }
  }
  return text + '"';
}

void reject_value(std::string_view key, std::string_view value, std::string_view why) {
  throw std::invalid_argument(std::string(key) + " = " + std::string(value) + ": " +
                              std::string(why));
}

void require_at_least(int64_t least, std::string_view key, const std::optional<int64_t>& value) {
  if (value && *value < least) {
    reject_value(key, to_config_text(*value), "must be " + to_config_text(least) + " or more");
  }
}

void require_in_range(double least, double most, std::string_view key, double value) {
  if (value >= least && value <= most && std::isfinite(value)) {
    return;
  }
  const std::string low = to_config_text(least);
  reject_value(key,
               to_config_text(value),
               std::isinf(most) ? "must be a finite number, " + low + " or more"
                                : "must lie from " + low + " to " + to_config_text(most));
}

}  // namespace rwkv
