// Corpora: .idx, .bin and the side file, back to back in one input, whose last four bytes say how
// many of its bytes are the .bin and how many the side file (u16 each, little-endian).
#include <algorithm>
#include <array>
#include <vector>

#include "data/binidx.h"
#include "tests/fuzz/fuzz_file.h"

namespace {

size_t u16_at(std::span<const uint8_t> bytes, size_t offset) {
  return bytes[offset] | static_cast<size_t>(bytes[offset + 1]) << 8;
}

void read_corpus(const std::string& folder) {
  const rwkv::BinidxFile file(folder + "a");
  std::vector<int64_t> ids(static_cast<size_t>(std::min<int64_t>(file.num_tokens(), 4096)));
  file.read(file.num_tokens() - static_cast<int64_t>(ids.size()), ids);
  for (int64_t i = 0; i < std::min<int64_t>(file.num_documents(), 4096); ++i) {
    ids.resize(static_cast<size_t>(
        std::min<int64_t>(file.document_end(i) - file.document_begin(i), 4096)));
    file.read(file.document_begin(i), ids);
    rwkv::require_ids_below(256, file, file.document_begin(i), ids);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const uint8_t> bytes(data, size);
  if (size < 4) {
    return 0;
  }
  const size_t bin_bytes = std::min(u16_at(bytes, size - 4), size - 4);
  const size_t record_bytes = std::min(u16_at(bytes, size - 2), size - 4 - bin_bytes);
  const size_t idx_bytes = size - 4 - bin_bytes - record_bytes;
  const std::array files{
      rwkv::fuzz::File{"a.idx", bytes.first(idx_bytes)},
      rwkv::fuzz::File{"a.bin", bytes.subspan(idx_bytes, bin_bytes)},
      rwkv::fuzz::File{"a.tokenizer.json", bytes.subspan(idx_bytes + bin_bytes, record_bytes)}};
  rwkv::fuzz::feed(files, rwkv::fuzz::Blame::kFile, read_corpus);
  return 0;
}
