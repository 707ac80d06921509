#include <string>

#include <gtest/gtest.h>

#include "data/utf8.h"

namespace rwkv {
namespace {

std::string utf8(uint32_t code) {
  std::string text;
  append_utf8(code, text);
  return text;
}

TEST(ShownCharLength, IsThatOfACharacter) {
  EXPECT_EQ(shown_char_length(" x"), 1u);
  EXPECT_EQ(shown_char_length("~"), 1u);
  for (const uint32_t code : {0xA0u, 0xFCu, 0x2029u, 0x202Fu, 0x2065u, 0x206Au, 0x1F600u}) {
    EXPECT_EQ(shown_char_length(utf8(code)), utf8(code).size()) << code;
  }
}

TEST(ShownCharLength, IsNoneOfWhatATerminalObeys) {
  for (const uint32_t code : {0x00u, 0x09u, 0x0Au, 0x1Bu, 0x1Fu, 0x7Fu, 0x80u, 0x9Bu, 0x9Fu}) {
    EXPECT_EQ(shown_char_length(utf8(code)), 0u) << code;
  }
  for (const uint32_t code : {0x202Au, 0x202Eu, 0x2066u, 0x2069u}) {
    EXPECT_EQ(shown_char_length(utf8(code)), 0u) << code;
  }
}

TEST(ShownCharLength, IsNoneOfNoCharacter) {
  EXPECT_EQ(shown_char_length(""), 0u);
  EXPECT_EQ(shown_char_length("\x9b"), 0u);
  EXPECT_EQ(shown_char_length("\xe2\x80"), 0u);
}

}  // namespace
}  // namespace rwkv
