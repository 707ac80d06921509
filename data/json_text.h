// JSON out of files from anywhere: what the library takes in good faith is refused here.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace rwkv {

// Throws std::runtime_error, starting with `where` (a path) and ending with `advice` (what was
// expected, or what to do), for text that is not JSON, for an object with a key twice (the library
// would keep one of the values and say nothing), and for values nested deeper than 64 levels (to
// print one takes a stack frame a level). Memory: up to 30 times the text.
nlohmann::json parse_json(std::string_view text,
                          const std::string& where,
                          const std::string& advice);

// A value as an error text may show it: at most 80 bytes of its JSON.
std::string shown_json(const nlohmann::json& value);

}  // namespace rwkv
