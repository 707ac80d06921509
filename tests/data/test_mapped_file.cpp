#include <csignal>
#include <filesystem>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/mapped_file.h"
#include "data/mapping_guard.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

TEST(MappedFile, ShowsTheBytesOfTheFile) {
  const test::TempFolder folder;
  test::write_file(folder.path("a"), "abc");
  const MappedFile file(folder.path("a"));
  ASSERT_EQ(file.bytes().size(), 3u);
  EXPECT_EQ(file.bytes()[2], std::byte{'c'});
  test::write_file(folder.path("empty"), "");
  EXPECT_TRUE(MappedFile(folder.path("empty")).bytes().empty());
}

TEST(MappedFile, NamesWhatCannotBeMapped) {
  const test::TempFolder folder;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, MappedFile(folder.path("none"))),
              testing::HasSubstr("none: cannot be opened: No such file"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, MappedFile(folder.path())),
              testing::HasSubstr("is a directory, expected a file"));
  // It would wait for a writer.
  ASSERT_EQ(::mkfifo(folder.path("pipe").c_str(), 0600), 0);
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, MappedFile(folder.path("pipe"))),
              testing::HasSubstr("pipe: is not a regular file, expected a file"));
}

constexpr size_t kBytes = size_t{1} << 20;

// Maps a file, cuts it, and reads past its new end.
void read_a_file_that_was_cut(const std::string& path) {
  report_shrunk_mappings();
  test::write_file(path, std::string(kBytes, 'x'));
  // One that is forgotten again, and one that moves: what is remembered follows.
  { const MappedFile gone(path); }
  MappedFile moved(path);
  const MappedFile file(std::move(moved));
  std::filesystem::resize_file(path, 5000);
  volatile std::byte last = file.bytes()[kBytes - 1];
  static_cast<void>(last);
}

TEST(MappingGuardDeathTest, NamesAFileThatBecameShorter) {
  const test::TempFolder folder;
  EXPECT_EXIT(read_a_file_that_was_cut(folder.path("a.bin")),
              testing::ExitedWithCode(1),
              "rookery: .*a\\.bin: became shorter while it was being read: 5000 bytes, but 1048576 "
              "when it was opened");
}

TEST(MappingGuardDeathTest, LeavesOtherFaultsAlone) {
  const test::TempFolder folder;
  // A sanitizer has a handler of its own.
  const auto fault_elsewhere = [&] {
    std::signal(SIGBUS, SIG_DFL);
    report_shrunk_mappings();
    test::write_file(folder.path("a"), "x");
    const int fd = ::open(folder.path("a").c_str(), O_RDONLY);
    void* const mapped = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
    std::filesystem::resize_file(folder.path("a"), 0);
    volatile char first = *static_cast<char*>(mapped);
    static_cast<void>(first);
  };
  EXPECT_EXIT(fault_elsewhere(), testing::KilledBySignal(SIGBUS), "");
  const auto send = [] {
    std::signal(SIGBUS, SIG_DFL);
    report_shrunk_mappings();
    ::raise(SIGBUS);
  };
  EXPECT_EXIT(send(), testing::KilledBySignal(SIGBUS), "");
}

}  // namespace
}  // namespace rwkv
