// What the targets of tokenizer files share.
#pragma once

#include <vector>

#include "data/tokenizer.h"
#include "tests/fuzz/fuzz_file.h"

namespace rwkv::fuzz {

// Opens the file as a tokenizer of class T, and uses it on a text.
template <class T>
void feed_tokenizer(const char* name, const uint8_t* data, size_t size) {
  feed({name, {data, size}}, Blame::kFile, [](const std::string& path) {
    const T tokenizer(path);
    std::vector<int32_t> ids;
    const size_t done = tokenizer.encode_part(awkward_text(), Tokenizer::TextEnd::kMore, ids);
    tokenizer.encode_part(awkward_text().substr(done), Tokenizer::TextEnd::kFinal, ids);
    std::string text;
    tokenizer.decode(ids, text);
    if (tokenizer.is_lossless() && text != awkward_text()) {
      std::abort();
    }
    for (const int32_t id : ids) {
      if (id < 0 || id >= tokenizer.vocab_size()) {
        std::abort();
      }
    }
  });
}

}  // namespace rwkv::fuzz
