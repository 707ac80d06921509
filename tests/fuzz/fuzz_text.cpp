// Text files: the first byte of an input says which ending the name of the file gets.
#include <array>

#include "data/text_reader.h"
#include "tests/fuzz/fuzz_file.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr std::array kNames{
      "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.txt.zst"};
  if (size == 0) {
    return 0;
  }
  rwkv::fuzz::feed({kNames[data[0] % kNames.size()], {data + 1, size - 1}},
                   rwkv::fuzz::Blame::kFile,
                   [](const std::string& path) {
                     rwkv::TextReader reader({path}, {});
                     // A compressed file of a few bytes may hold gigabytes of text, and is read in
                     // constant memory: some of it will do.
                     uint64_t bytes = 0;
                     for (rwkv::TextPiece piece; bytes < 8 << 20 && reader.next(piece);) {
                       bytes += piece.text.size() + 1;
                     }
                   });
  return 0;
}
