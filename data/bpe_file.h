// The content of a Hugging Face tokenizers file with byte-level BPE, checked.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "data/bpe_merges.h"

namespace rwkv {

struct BpeFile {
  struct AddedToken {
    int32_t id = 0;
    std::string content;      // UTF-8
    bool normalized = false;  // found in the text after normalisation, not before
  };
  std::vector<std::string> tokens;  // [id]: its bytes; empty where the file names no token
  std::vector<bool> is_added;       // [id]
  // [byte]: its token; -1 for those of the bytes C0, C1 and F5 .. FF, which UTF-8 never uses, that
  // the file leaves out (20B_tokenizer.json does).
  std::array<int32_t, 256> byte_ids{};
  std::vector<BpeMerges::Merge> merges;
  std::vector<AddedToken> added_tokens;
};

// `path` is for the error texts. Throws std::runtime_error "PATH: ..." for what bpe_tokenizer.h
// lists.
BpeFile parse_bpe_file(const std::string& path, std::string_view content);

}  // namespace rwkv
