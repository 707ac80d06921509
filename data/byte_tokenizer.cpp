#include "data/byte_tokenizer.h"

#include <stdexcept>

namespace rwkv {

size_t ByteTokenizer::encode_part(std::string_view text,
                                  TextEnd /*end*/,
                                  std::vector<int32_t>& ids) const {
  const size_t before = ids.size();
  ids.resize(before + text.size());
  for (size_t i = 0; i < text.size(); ++i) {
    ids[before + i] = static_cast<unsigned char>(text[i]);
  }
  return text.size();
}

void ByteTokenizer::decode(std::span<const int32_t> ids, std::string& text) const {
  for (const int32_t id : ids) {
    if (id < 0 || id > 255) {
      throw std::invalid_argument("token id " + std::to_string(id) +
                                  " is not a byte; expected 0 .. 255");
    }
    text += static_cast<char>(id);
  }
}

}  // namespace rwkv
