// TensorBoard event files. The first byte of an input says how the rest is taken: 0 as a file; else
// as the messages of such a file, each after its length in one byte, put into records with the
// right checksums, which no mutation would hit.
#include <algorithm>
#include <string>

#include "tests/fuzz/fuzz_file.h"
#include "train/event_file.h"

namespace {

std::string masked_crc32c(std::string_view bytes) {
  uint32_t crc = ~0u;
  for (const char c : bytes) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) {
      crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82f63b78u : 0u);
    }
  }
  crc = ~crc;
  const uint32_t masked = (crc >> 15 | crc << 17) + 0xa282ead8u;
  return {reinterpret_cast<const char*>(&masked), sizeof masked};
}

std::string records_of(std::string_view messages) {
  std::string file;
  while (!messages.empty()) {
    const size_t wanted = static_cast<unsigned char>(messages[0]);
    const std::string_view message = messages.substr(1, wanted);
    messages.remove_prefix(1 + message.size());
    const uint64_t length = message.size();
    const std::string length_bytes(reinterpret_cast<const char*>(&length), sizeof length);
    file += length_bytes + masked_crc32c(length_bytes);
    file.append(message).append(masked_crc32c(message));
  }
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) {
    return 0;
  }
  const std::string_view rest(reinterpret_cast<const char*>(data + 1), size - 1);
  const std::string file = data[0] == 0 ? std::string(rest) : records_of(rest);
  rwkv::fuzz::feed({"events", {reinterpret_cast<const uint8_t*>(file.data()), file.size()}},
                   rwkv::fuzz::Blame::kFile,
                   [](const std::string& path) {
                     rwkv::EventReader reader(path);
                     while (reader.next()) {
                     }
                     reader.cut_bytes();
                   });
  return 0;
}
