#include "data/content_hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace rwkv {

std::string content_hash(std::span<const std::byte> bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  XXH128_canonical_t big_endian;
  XXH128_canonicalFromHash(&big_endian, hash);
  std::string hex;
  for (const unsigned char byte : big_endian.digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

}  // namespace rwkv
