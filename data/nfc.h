// Unicode normalisation form C (UAX #15), by utf8proc's tables.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

// Normalises text that is mostly normal already: stretches that are cost a table look-up per
// character that is not ASCII, and only the rest is decomposed and composed. One object per thread.
class NfcNormalizer {
 public:
  // `text` must be well-formed UTF-8. Returns `text` itself if it is in form C, otherwise a view
  // of a buffer that is valid until the next call.
  std::string_view normalize(std::string_view text);

 private:
  void append_normalized(std::string_view segment);

  std::string result_;
  std::vector<int32_t> code_points_;
};

}  // namespace rwkv
