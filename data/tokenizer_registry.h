// The table from a tokenizer's name to its reader.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "data/tokenizer.h"

namespace rwkv {

// `spec` is one of
//   world               RWKV World with the installed vocabulary (see find_installed_file)
//   world:FILE          RWKV World from a vocabulary file such as rwkv_vocab_v20230424.txt
//   neox:FILE           GPT-NeoX 20B from 20B_tokenizer.json
//   sentencepiece:FILE  a sentencepiece model
//   bytes               256 tokens, one a byte value
// Throws std::invalid_argument for a spec of no known kind (the text lists them);
// std::runtime_error, naming file and line where there is one, for a file that cannot be used.
std::unique_ptr<Tokenizer> open_tokenizer(std::string_view spec);

// One line a kind, for --help texts.
std::string describe_tokenizer_specs();

// Path of a data file that set-up installed: share/rookery/<name> beside the folder of the running
// program. Throws std::runtime_error with both the path and how to get it if it is not there.
std::string find_installed_file(std::string_view name);
// The same for another program.
std::string find_installed_file(std::string_view name, const std::string& program);

}  // namespace rwkv
