// Ids that upstream's tokenizers gave (scripts/make_tokenizer_golden.py), and texts to try.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "tests/support/test_data.h"

namespace rwkv::test {

inline nlohmann::json tokenizer_golden() {
  return nlohmann::json::parse(read_file(golden("tokenizer_ids.json")));
}

inline std::string from_hex(const std::string& hex) {
  std::string bytes;
  for (size_t i = 0; i < hex.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

// Random text in which what tokenizers stumble over is frequent: white space of all sorts, broken
// UTF-8, marks that combine, text that looks like a special token.
inline std::string awkward_text(std::mt19937_64& random, size_t parts) {
  static const std::vector<std::string> kParts = {"a",
                                                  "b",
                                                  "the",
                                                  " the",
                                                  " ",
                                                  "  ",
                                                  "   ",
                                                  "\n",
                                                  "\n\n",
                                                  "\r\n",
                                                  "\r",
                                                  "\t",
                                                  "'s",
                                                  "'ll",
                                                  "7",
                                                  "42",
                                                  ".",
                                                  "...",
                                                  "\xC3\xA9",
                                                  "e\xCC\x81",
                                                  "\xCC\x81",
                                                  "\xCC\xA3",
                                                  "\xE4\xBD\xA0",
                                                  "\xE4\xBD",
                                                  "\xF0\x9F\x98\x80",
                                                  "\xF0\x9F",
                                                  "\xFF",
                                                  "\xC0",
                                                  "\x80",
                                                  "\xED\xA0\x80",
                                                  "\xC2\xA0",
                                                  "\xE3\x80\x80",
                                                  "\xC2\x85",
                                                  "\xE2\x80\xA8",
                                                  "\xE1\xA0\x8E",
                                                  "\xE2\x96\x81",
                                                  "\xE2\x96\x85",
                                                  "\xEF\xBF\xBD",
                                                  "\xEF\xBF\xBE",
                                                  "<|endoftext|>",
                                                  "<|endo",
                                                  "<|",
                                                  "|>",
                                                  "<s>",
                                                  "</s>",
                                                  "<0x41>",
                                                  std::string(1, '\0'),
                                                  "\xE1\x84\x80",
                                                  "\xE1\x85\xA1",
                                                  "\xE1\x86\xA8",
                                                  "\xEA\xB0\x80"};
  std::string text;
  for (size_t i = 0; i < parts; ++i) {
    if (random() % 8 == 0) {
      text += static_cast<char>(random());
    } else {
      text += kParts[random() % kParts.size()];
    }
  }
  return text;
}

}  // namespace rwkv::test
