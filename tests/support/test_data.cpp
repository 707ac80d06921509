#include "tests/support/test_data.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include <unistd.h>

namespace rwkv::test {

std::string find_test_data(const std::string& name) {
  const char* root = std::getenv("ROOKERY_TEST_DATA");
  const std::filesystem::path path =
      std::filesystem::path(root != nullptr ? root : "../shared/data") / name;
  if (std::filesystem::exists(path)) {
    return path.string();
  }
  if (std::getenv("CI") != nullptr) {
    throw std::runtime_error(path.string() + ": test data is missing, and CI must have it");
  }
  return "";
}

std::string golden(const std::string& name) {
  return "tests/golden/" + name;
}

TempFolder::TempFolder() {
  std::string pattern = (std::filesystem::temp_directory_path() / "rookery_test_XXXXXX").string();
  if (::mkdtemp(pattern.data()) == nullptr) {
    throw std::runtime_error(pattern + ": cannot be created");
  }
  folder_ = pattern;
}

TempFolder::~TempFolder() {
  std::filesystem::remove_all(folder_);
}

std::vector<std::string> TempFolder::files() const {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
    names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

void write_file(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string read_file(const std::string& path) {
  std::ostringstream content;
  content << std::ifstream(path, std::ios::binary).rdbuf();
  return content.str();
}

}  // namespace rwkv::test
