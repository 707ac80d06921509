#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

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

TEST(AtomicFile, TakesOverWhatAKilledWriterLeft) {
  const test::TempFolder folder;
  const pid_t writer = ::fork();
  if (writer == 0) {
    AtomicFile file(folder.path("a.bin"));
    file.write(std::string(3 << 20, 'x'));
    ::_exit(0);  // no destructor runs
  }
  ASSERT_EQ(::waitpid(writer, nullptr, 0), writer);
  EXPECT_THAT(folder.files(), testing::ElementsAre("a.bin.partial"));
  AtomicFile file(folder.path("a.bin"));
  file.write("new");
  file.commit();
  EXPECT_EQ(test::read_file(folder.path("a.bin")), "new");
  EXPECT_THAT(folder.files(), testing::ElementsAre("a.bin"));
}

TEST(AtomicFile, RefusesASecondWriterUntilTheFirstIsDone) {
  const test::TempFolder folder;
  {
    AtomicFile first(folder.path("a.bin"));
    first.write("first");
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, AtomicFile(folder.path("a.bin"))),
                testing::HasSubstr("a.bin: is being written by another program"));
    first.commit();
    AtomicFile second(folder.path("a.bin"));
    second.write("second");
  }
  EXPECT_EQ(test::read_file(folder.path("a.bin")), "first");
  EXPECT_THAT(folder.files(), testing::ElementsAre("a.bin"));
}

// Six programs write one path over and over: whoever gets the lock has a file that nobody else
// renames, truncates or removes.
TEST(AtomicFile, IsWholeHoweverManyWriteIt) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.bin"), std::string(1000, 'x'));
  std::vector<pid_t> writers;
  for (int i = 0; i < 6; ++i) {
    writers.push_back(::fork());
    if (writers.back() == 0) {
      for (int round = 0; round < 100; ++round) {
        try {
          AtomicFile file(folder.path("a.bin"));
          file.write(std::string(1000, static_cast<char>('a' + i)));
          file.commit();
        } catch (const std::runtime_error&) {
          // Another has it.
        }
        const std::string content = test::read_file(folder.path("a.bin"));
        if (content != std::string(1000, content.empty() ? ' ' : content.front())) {
          ::_exit(1);
        }
      }
      ::_exit(0);
    }
  }
  for (const pid_t writer : writers) {
    int status = 0;
    ASSERT_EQ(::waitpid(writer, &status, 0), writer);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(test::read_file(folder.path("a.bin")).size(), 1000u);
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
  std::filesystem::create_symlink("/dev/full", folder.path("a.bin.partial"));
  AtomicFile file(folder.path("a.bin"));
  const std::string text = THROWN_TEXT(std::runtime_error, file.write(std::string(3 << 20, 'x')));
  EXPECT_THAT(text,
              testing::HasSubstr("a.bin: writing failed after 3,145,728 bytes: No space left"));
  EXPECT_THAT(text, testing::HasSubstr("the disk is full; make room, or write elsewhere"));
}

TEST(AtomicFile, ReportsALimitOnFileSize) {
  const test::TempFolder folder;
  const pid_t writer = ::fork();
  if (writer == 0) {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    try {
      AtomicFile(folder.path("a.bin")).write(std::string(3 << 20, 'x'));
    } catch (const std::runtime_error& error) {
      ::_exit(std::string(error.what()).find("see ulimit -f") != std::string::npos ? 0 : 1);
    }
    ::_exit(2);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(writer, &status, 0), writer);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(folder.files().empty());
}

}  // namespace
}  // namespace rwkv
