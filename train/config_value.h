// How values of a configuration are written in TOML and in error texts. Shared by the structs'
// validate() and by config_file; knows no TOML library.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace rwkv {

// The shortest decimal text that reads back as the same double; always a TOML float ("1.0",
// "1e-08", "inf", "nan"), never an integer.
std::string to_config_text(double value);
std::string to_config_text(int64_t value);
// A TOML basic string in double quotes. Bytes above 127 pass unchanged: TOML is UTF-8.
std::string to_config_text(std::string_view value);

// Throws std::invalid_argument "key = value: why". `value` is a text from above.
[[noreturn]] void reject_value(std::string_view key, std::string_view value, std::string_view why);

// Throw through reject_value, saying the bound, unless value lies in it; NaN never does, what is
// not given always.
void require_at_least(int64_t least, std::string_view key, const std::optional<int64_t>& value);
void require_in_range(double least, double most, std::string_view key, double value);

}  // namespace rwkv
