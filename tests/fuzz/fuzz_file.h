// What the fuzz targets share: libFuzzer's bytes as files, and what a reader may do with them.
//
// Each target is a program of libFuzzer's (https://llvm.org/docs/LibFuzzer.html) over one reader.
// It feeds the reader made-up files; whatever they hold, the reader takes them or throws what
// `feed` allows. All else (another exception, a fault, a sanitizer's finding, too much time or
// memory) stops the program, and leaves the input that did it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace rwkv::fuzz {

// A file to be written: its name without a folder, and its bytes.
struct File {
  std::string_view name;
  std::span<const uint8_t> bytes;
};

// Whose mistake a broken file is: a std::runtime_error, or, in what users write by hand, also a
// std::invalid_argument.
enum class Blame { kFile, kUser };

// Writes `files` into a folder of this process below TMPDIR, which should be in memory, and calls
// `read` with that folder's path and a slash. A text thrown must begin with that path, so that it
// names the file, and be no longer than a person reads.
void feed(std::span<const File> files,
          Blame blame,
          const std::function<void(const std::string& folder)>& read);
// The same for one file; `read` gets its path.
void feed(const File& file, Blame blame, const std::function<void(const std::string& path)>& read);

// A text on which tokenizers stumble: broken UTF-8, marks to be composed, runs of spaces, names of
// special tokens.
std::string_view awkward_text();

}  // namespace rwkv::fuzz
