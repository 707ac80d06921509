// A name for the content of a file, to tell whether two files are the same.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace rwkv {

// XXH3 with 128 bits, as 32 lower-case hexadecimal digits (the form of `xxhsum -H2`). Not for
// protection against someone who wants two files to collide.
std::string content_hash(std::span<const std::byte> bytes);

}  // namespace rwkv
