#include <csignal>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include "tests/support/test_data.h"
#include "train/event_file.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::StartsWith;

std::vector<Event> events_of(const std::string& path) {
  EventReader reader(path);
  std::vector<Event> events;
  while (auto event = reader.next()) {
    events.push_back(std::move(*event));
  }
  return events;
}

// A file of three scalars and its path.
std::string write_sample(const test::TempFolder& folder) {
  EventWriter writer(folder.path(), 0, 1000.5);
  for (int64_t step = 1; step <= 3; ++step) {
    writer.scalar("train/loss", step, 1000.0 + static_cast<double>(step), 0.5 * double(step));
  }
  writer.flush();
  return writer.path();
}

TEST(EventFile, HoldsWhatWasWritten) {
  const test::TempFolder folder;
  EventWriter writer(folder.path("run/tensorboard"), 20, 1700000000.25);
  writer.scalar("train/loss", 21, 1700000001.5, 2.25);
  writer.text("sample", 21, 1700000002, "one\n\ntwo");
  writer.flush();

  const auto events = events_of(writer.path());
  ASSERT_EQ(events.size(), 4U);
  EXPECT_EQ(events[0].file_version, "brain.Event:2");
  EXPECT_EQ(events[0].time_s, 1700000000.25);
  EXPECT_TRUE(events[1].starts_session);
  EXPECT_EQ(events[1].step, 21);
  ASSERT_EQ(events[2].values.size(), 1U);
  EXPECT_EQ(events[2].step, 21);
  EXPECT_EQ(events[2].time_s, 1700000001.5);
  EXPECT_EQ(events[2].values[0].tag, "train/loss");
  EXPECT_EQ(events[2].values[0].scalar, 2.25);
  EXPECT_EQ(events[3].values[0].text, "    one\n    \n    two");
}

TEST(EventFile, IsNamedAboveOlderFilesWhateverTheClockSays) {
  const test::TempFolder folder;
  const std::string first = EventWriter(folder.path(), 0, 1700000000).path();
  const std::string second = EventWriter(folder.path(), 0, 1600000000).path();
  EXPECT_THAT(std::filesystem::path(first).filename().string(),
              StartsWith("events.out.tfevents.1700000000."));
  EXPECT_THAT(std::filesystem::path(second).filename().string(),
              StartsWith("events.out.tfevents.1700000001."));
}

TEST(EventFile, KeepsBrokenUtf8OutOfTagsAndTexts) {
  const test::TempFolder folder;
  EventWriter writer(folder.path(), 0, 0);
  writer.text("a\xff", 1, 0, "\xc3\xa9\xc3");
  writer.flush();
  const auto events = events_of(writer.path());
  EXPECT_EQ(events.back().values[0].tag, "a\xef\xbf\xbd");
  EXPECT_EQ(events.back().values[0].text, "    \xc3\xa9\xef\xbf\xbd");
}

TEST(EventFile, EndsBeforeACutRecordWhereverItWasCut) {
  const test::TempFolder folder;
  const std::string path = write_sample(folder);
  const std::string whole = test::read_file(path);
  size_t whole_events = 0;
  for (size_t size = 0; size < whole.size(); ++size) {
    test::write_file(path, whole.substr(0, size));
    EventReader reader(path);
    size_t num_events = 0;
    while (reader.next()) {
      ++num_events;
    }
    // A cut takes nothing but the record that it is in.
    EXPECT_GE(num_events, whole_events);
    EXPECT_LE(num_events, whole_events + 1);
    whole_events = num_events;
    EXPECT_LT(reader.cut_bytes(), 60U);
    EXPECT_LE(reader.cut_bytes(), size);
  }
  EXPECT_EQ(whole_events, 4U);
}

TEST(EventFile, RefusesEveryChangedByte) {
  const test::TempFolder folder;
  const std::string path = write_sample(folder);
  const std::string whole = test::read_file(path);
  for (size_t i = 0; i < whole.size(); ++i) {
    std::string broken = whole;
    broken[i] = static_cast<char>(broken[i] ^ 0x10);
    test::write_file(path, broken);
    const std::string text = THROWN_TEXT(std::runtime_error, events_of(path));
    EXPECT_THAT(text, AllOf(StartsWith(path + ": at byte "), HasSubstr("checksum")));
  }
}

TEST(EventFile, RefusesOtherFiles) {
  const test::TempFolder folder;
  const std::string path = folder.path("text");
  test::write_file(path, "No event file at all.\n");
  EXPECT_EQ(THROWN_TEXT(std::runtime_error, events_of(path)),
            path +
                ": at byte 0: the checksum of a record's length is wrong; the file is damaged "
                "there, or is no event file of TensorBoard");
  EXPECT_FALSE(is_event_file(std::as_bytes(std::span("short", 5))));
}

TEST(EventFile, ReportsAFullDisk) {
  const test::TempFolder folder;
  EventWriter writer(folder.path(), 0, 0);
  // Beyond the limit the system sends a signal first, whose default is to end the program.
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit{};
  getrlimit(RLIMIT_FSIZE, &old_limit);
  rlimit limit = old_limit;
  limit.rlim_cur = 4096;
  setrlimit(RLIMIT_FSIZE, &limit);
  const std::string text = THROWN_TEXT(std::runtime_error, {
    for (int64_t step = 0; step < 1000; ++step) {
      writer.scalar("train/loss", step, 0, 1);
    }
    writer.flush();
  });
  setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, handler);
  EXPECT_THAT(text, AllOf(StartsWith(writer.path()), HasSubstr("is the disk full?")));
}

TEST(EventFile, NamesAFolderThatCannotBeMade) {
  const test::TempFolder folder;
  test::write_file(folder.path("file"), "");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, EventWriter(folder.path("file/sub"), 0, 0)),
              StartsWith(folder.path("file/sub") + ": the folder cannot be made: "));
}

}  // namespace
}  // namespace rwkv
