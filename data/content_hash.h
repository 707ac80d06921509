// A name for the content of a file, to tell whether two files are the same.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace rwkv {

// XXH3 with 128 bits, as 32 lower-case hexadecimal digits (the form of `xxhsum -H2`). Not for
// protection against someone who wants two files to collide.
std::string content_hash(std::span<const std::byte> bytes);

// The same of content that comes in parts, as a file is written.
class ContentHasher {
 public:
  ContentHasher();
  ~ContentHasher();
  ContentHasher(const ContentHasher&) = delete;
  ContentHasher& operator=(const ContentHasher&) = delete;

  void add(std::span<const std::byte> bytes);
  // Of all that was added so far.
  std::string hash() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace rwkv
