// Numbers as error texts and progress lines show them.
#pragma once

#include <cstdint>
#include <string>

namespace rwkv {

// 1498226207 as "1,498,226,207".
inline std::string grouped(uint64_t number) {
  std::string text = std::to_string(number);
  for (size_t i = text.size(); i > 3; i -= 3) {
    text.insert(i - 3, 1, ',');
  }
  return text;
}

}  // namespace rwkv
