#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/atomic_file.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

TEST(AtomicFile, AppearsWholeAtCommit) {
  const test::TempFolder folder;
  AtomicFile file(folder.path("a.bin"));
  file.write("first ");
  file.write(std::string(3 << 20, 'x'));
  EXPECT_FALSE(std::filesystem::exists(folder.path("a.bin")));
  file.commit();
  EXPECT_EQ(test::read_file(folder.path("a.bin")), "first " + std::string(3 << 20, 'x'));
  EXPECT_THAT(folder.files(), testing::ElementsAre("a.bin"));
}

TEST(AtomicFile, LeavesNothingWithoutCommit) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.bin"), "old");
  {
    AtomicFile file(folder.path("a.bin"));
    file.write(std::string(3 << 20, 'x'));
  }
  EXPECT_EQ(test::read_file(folder.path("a.bin")), "old");
  EXPECT_THAT(folder.files(), testing::ElementsAre("a.bin"));
}

TEST(AtomicFile, NamesPathAndReasonWhereItCannotWrite) {
  const std::string text = THROWN_TEXT(std::runtime_error, AtomicFile("/nonexistent/folder/a.bin"));
  EXPECT_THAT(text, testing::HasSubstr("/nonexistent/folder/a.bin"));
  EXPECT_THAT(text, testing::HasSubstr("No such file"));
}

TEST(AtomicFile, ReportsAFullDisk) {
  if (!std::filesystem::exists("/dev/full")) {
    GTEST_SKIP() << "no /dev/full here";
  }
  // The temporary name is a link to the device that is always full.
  const test::TempFolder folder;
  std::filesystem::create_symlink("/dev/full",
                                  folder.path("a.bin.partial-" + std::to_string(::getpid())));
  AtomicFile file(folder.path("a.bin"));
  const std::string text = THROWN_TEXT(std::runtime_error, file.write(std::string(3 << 20, 'x')));
  EXPECT_THAT(text, testing::HasSubstr("No space left"));
}

}  // namespace
}  // namespace rwkv
