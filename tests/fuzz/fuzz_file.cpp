#include "tests/fuzz/fuzz_file.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include <unistd.h>

namespace rwkv::fuzz {
namespace {

constexpr size_t kLongestText = 4000;

class Folder {
 public:
  Folder()
      : path_(std::filesystem::temp_directory_path() /
              ("rookery_fuzz." + std::to_string(::getpid()))) {
    std::filesystem::create_directory(path_);
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string path() const { return path_.string() + "/"; }

 private:
  std::filesystem::path path_;
};

void write(const std::string& path, std::span<const uint8_t> bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) {
    std::fprintf(stderr, "%s: cannot be written\n", path.c_str());
    std::exit(1);
  }
}

void check_text(const std::string& text, const std::string& folder) {
  if (!text.starts_with(folder) || text.size() > kLongestText) {
    std::fprintf(stderr,
                 "a text of %zu bytes, expected at most %zu and %s at its beginning:\n%.400s\n",
                 text.size(),
                 kLongestText,
                 folder.c_str(),
                 text.c_str());
    std::abort();
  }
}

}  // namespace

void feed(std::span<const File> files,
          Blame blame,
          const std::function<void(const std::string& folder)>& read) {
  static const Folder folder;
  for (const File& file : files) {
    write(folder.path() + std::string(file.name), file.bytes);
  }
  try {
    read(folder.path());
  } catch (const std::runtime_error& error) {
    check_text(error.what(), folder.path());
  } catch (const std::invalid_argument& error) {
    if (blame == Blame::kFile) {
      throw;
    }
    check_text(error.what(), folder.path());
  }
}

void feed(const File& file, Blame blame, const std::function<void(const std::string& path)>& read) {
  feed(std::span(&file, 1), blame, [&](const std::string& folder) {
    read(folder + std::string(file.name));
  });
}

std::string_view awkward_text() {
  return "Hello  world,\n\n12345 it's A\xCC\x8A\xCC\xA3 \xE1\x84\x80\xE1\x85\xA1 \xEF\xAC\x81 "
         "\xF0\x9F\x98\x80<|endoftext|></s><unk>\t          x\xC0\xFF\xED\xA0\x80\r\n \xE2\x96\x81 "
         "\xE4\xBB\xA5\xE4\xB8\x8B\xE3\x81\xAF";
}

}  // namespace rwkv::fuzz
