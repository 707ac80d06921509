// Where tests find the corpora, tokenizers and golden tensors that are not in the repository, and
// folders to write in.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace rwkv::test {

// Path of a file under ROOKERY_TEST_DATA (default ../shared/data, from the repository root), or an
// empty string if it is not there. In CI (the environment variable CI is set) absence throws
// std::runtime_error instead: there a missing file is a failure.
std::string find_test_data(const std::string& name);

// Path of a file under tests/golden, which the repository holds.
std::string golden(const std::string& name);

// A fresh folder, removed with all it holds when the object goes.
class TempFolder {
 public:
  TempFolder();
  ~TempFolder();
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  std::string path(const std::string& name = "") const { return (folder_ / name).string(); }
  // Names of the files in it, sorted: to show that nothing was left behind.
  std::vector<std::string> files() const;

 private:
  std::filesystem::path folder_;
};

void write_file(const std::string& path, const std::string& content);
std::string read_file(const std::string& path);

}  // namespace rwkv::test

// Ends a test as skipped, with the reason, if `path` (from find_test_data) is empty.
#define SKIP_WITHOUT(path) \
  if ((path).empty()) GTEST_SKIP() << "test data not found; set ROOKERY_TEST_DATA"

// Runs `statement`, which must throw `type`, and gives the text of what it threw.
#define THROWN_TEXT(type, statement)                     \
  [&]() -> std::string {                                 \
    try {                                                \
      statement;                                         \
    } catch (const type& error) {                        \
      return error.what();                               \
    }                                                    \
    ADD_FAILURE() << #statement " did not throw " #type; \
    return "";                                           \
  }()
