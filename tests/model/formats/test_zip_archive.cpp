#include <cstring>

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "data/mapped_file.h"
#include "model/formats/zip_archive.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::span<const std::byte> as_bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

std::string_view as_text(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// A zip of "a/x" = "hello", "a/empty" = "" and "a/y" = 200 times 'y'.
std::string small_zip(uint64_t zip64_from = 0xffffffff) {
  const test::TempFolder folder;
  AtomicFile file(folder.path("a.zip"));
  ZipWriter writer(file, zip64_from);
  writer.add("a/x", "hello");
  writer.add("a/empty", "");
  writer.add("a/y", std::string(200, 'y'));
  writer.finish();
  file.commit();
  return test::read_file(folder.path("a.zip"));
}

// A small zip with one number changed, at `offset` from the end or, if 0 or more, from the start.
template <class T>
std::string changed(std::string zip, ptrdiff_t offset, T value) {
  const size_t at =
      offset < 0 ? zip.size() - static_cast<size_t>(-offset) : static_cast<size_t>(offset);
  std::memcpy(zip.data() + at, &value, sizeof value);
  return zip;
}

std::string refusal(const std::string& zip) {
  return THROWN_TEXT(std::runtime_error, ZipArchive(as_bytes_of(zip), "a.zip"));
}

std::string data_refusal(const std::string& zip, std::string_view name) {
  const ZipArchive archive(as_bytes_of(zip), "a.zip");
  const ZipEntry* entry = archive.find(name);
  EXPECT_NE(entry, nullptr);
  return THROWN_TEXT(std::runtime_error, archive.data(*entry));
}

// The directory's first record: its offset stands 6 bytes before the end.
ptrdiff_t directory_of(const std::string& zip) {
  uint32_t offset = 0;
  std::memcpy(&offset, zip.data() + zip.size() - 6, sizeof offset);
  return offset;
}

TEST(ZipArchive, ReturnsWhatTheWriterWrote) {
  // The second writes everything in zip64 fields, the third only what is large.
  for (const uint64_t zip64_from : {uint64_t{0xffffffff}, uint64_t{0}, uint64_t{150}}) {
    const std::string zip = small_zip(zip64_from);
    const ZipArchive archive(as_bytes_of(zip), "a.zip");
    ASSERT_EQ(archive.entries().size(), 3u);
    EXPECT_EQ(archive.entries()[0].name, "a/x");
    EXPECT_EQ(as_text(archive.data(*archive.find("a/x"))), "hello");
    EXPECT_EQ(as_text(archive.data(*archive.find("a/empty"))), "");
    EXPECT_EQ(as_text(archive.data(*archive.find("a/y"))), std::string(200, 'y'));
    EXPECT_EQ(archive.find("a/z"), nullptr);
    EXPECT_EQ(archive.find("a"), nullptr);
    for (const ZipEntry& entry : archive.entries()) {
      const auto data = archive.data(entry);
      EXPECT_EQ((reinterpret_cast<const char*>(data.data()) - zip.data()) % 64, 0);
      EXPECT_EQ(entry.crc, crc32_of(data));
    }
  }
}

TEST(ZipArchive, ReadsPyTorchsFilesWithDescriptorsAndLocalSizesOfZero) {
  const std::string path = test::find_test_data("derived/pth_reader/mixed_zip.pth");
  SKIP_WITHOUT(path);
  const MappedFile file(path);
  const ZipArchive archive(file.bytes(), path);
  EXPECT_EQ(archive.entries().size(), 10u);
  for (const ZipEntry& entry : archive.entries()) {
    EXPECT_EQ(crc32_of(archive.data(entry)), entry.crc) << entry.name;
  }
  EXPECT_EQ(as_text(archive.data(*archive.find("t_zip/version"))), "3\n");
}

TEST(ZipArchive, FindsTheDirectoryBeforeAComment) {
  const std::string zip = changed(small_zip(), -2, uint16_t{300}) + std::string(300, 'c');
  EXPECT_EQ(ZipArchive(as_bytes_of(zip), "a.zip").entries().size(), 3u);
  // A comment that holds the mark of an end record is not one.
  const std::string marked =
      changed(small_zip(), -2, uint16_t{54}) + "PK\x05\x06" + std::string(50, 'c');
  EXPECT_EQ(ZipArchive(as_bytes_of(marked), "a.zip").entries().size(), 3u);
}

TEST(ZipArchive, RefusesEveryTruncation) {
  for (const uint64_t zip64_from : {uint64_t{0xffffffff}, uint64_t{0}}) {
    const std::string zip = small_zip(zip64_from);
    for (size_t length = 0; length < zip.size(); ++length) {
      EXPECT_THAT(refusal(zip.substr(0, length)), HasSubstr("cut short")) << length;
    }
  }
}

TEST(ZipArchive, RefusesADirectoryThatLies) {
  const std::string zip = small_zip();
  const ptrdiff_t directory = directory_of(zip);
  EXPECT_THAT(refusal(changed(zip, -12, uint16_t{60000})), HasSubstr("lists 60000 entries in"));
  EXPECT_THAT(refusal(changed(zip, -12, uint16_t{4})), HasSubstr("lists 4 entries in"));
  EXPECT_THAT(refusal(changed(zip, -6, uint32_t{0xfffffffe})), HasSubstr("outside the file"));
  EXPECT_THAT(refusal(changed(zip, -6, uint32_t{0xffffffff})), HasSubstr("zip64 locator"));
  EXPECT_THAT(refusal(changed(zip, -10, uint32_t{0x7fffffff})), HasSubstr("outside the file"));
  EXPECT_THAT(refusal(changed(zip, directory, uint32_t{0})), HasSubstr("not where it should be"));
  EXPECT_THAT(refusal(changed(zip, directory + 28, uint16_t{0xffff})),
              HasSubstr("reaches outside the directory"));
  EXPECT_THAT(refusal(changed(zip, directory + 20, uint32_t{4})),
              HasSubstr("stored as 4 bytes of 5"));
  EXPECT_THAT(refusal(changed(zip, directory + 42, uint32_t{0xffffffff})),
              HasSubstr("lacks its 64-bit size or offset"));
}

TEST(ZipArchive, RefusesAZip64DirectoryThatLies) {
  const std::string zip = small_zip(0);
  // From the end: end record 22, locator 20, zip64 end record 56.
  EXPECT_THAT(refusal(changed(zip, -42 + 8, uint64_t{0xfffffffffffffff0})),
              HasSubstr("where there is no zip64 end record"));
  EXPECT_THAT(refusal(changed(zip, -98 + 32, uint64_t{0xffffffffffffffff})),
              HasSubstr("lists 18446744073709551615 entries"));
  EXPECT_THAT(refusal(changed(zip, -98 + 40, uint64_t{0xffffffffffffffff})),
              HasSubstr("outside the file"));
  EXPECT_THAT(refusal(changed(zip, -98 + 48, uint64_t{0xffffffffffffff00})),
              HasSubstr("outside the file"));
}

TEST(ZipArchive, RefusesDataThatIsNotThere) {
  const std::string zip = small_zip();
  const ptrdiff_t directory = directory_of(zip);
  EXPECT_THAT(data_refusal(changed(zip, directory + 42, uint32_t{0x7fffffff}), "a/x"),
              HasSubstr("where no zip entry starts"));
  EXPECT_THAT(data_refusal(changed(zip, directory + 42, uint32_t{1}), "a/x"),
              HasSubstr("where no zip entry starts"));
  // The last entry would end inside the directory.
  EXPECT_THAT(data_refusal(changed(zip, 28, uint16_t{0xffff}), "a/x"),
              HasSubstr("reaches outside the data"));
  const std::string large =
      changed(changed(zip, directory + 20, uint32_t{0x10000}), directory + 24, uint32_t{0x10000});
  EXPECT_THAT(data_refusal(large, "a/x"), HasSubstr("reaches outside the data"));
}

TEST(ZipArchive, RefusesCompressedAndEncryptedEntries) {
  const std::string zip = small_zip();
  const ptrdiff_t directory = directory_of(zip);
  EXPECT_THAT(data_refusal(changed(zip, directory + 10, uint16_t{8}), "a/x"),
              AllOf(HasSubstr("a.zip: \"a/x\" is compressed (method 8)"), HasSubstr("torch.save")));
  EXPECT_THAT(data_refusal(changed(zip, directory + 8, uint16_t{1}), "a/x"),
              HasSubstr("is encrypted"));
  // The first local header says it, the directory does not.
  EXPECT_THAT(data_refusal(changed(zip, 8, uint16_t{8}), "a/x"), HasSubstr("is compressed"));
  EXPECT_THAT(data_refusal(changed(zip, 6, uint16_t{1}), "a/x"), HasSubstr("is encrypted"));
}

TEST(ZipArchive, RefusesDataOfAnotherName) {
  const std::string zip = small_zip();
  // The directory's record of "a/x" points to where "a/y" is.
  const auto y_header = static_cast<uint32_t>(zip.find("a/y") - 30);
  const ptrdiff_t directory = directory_of(zip);
  EXPECT_THAT(data_refusal(changed(zip, directory + 42, y_header), "a/x"),
              HasSubstr("\"a/x\" is said to be at offset " + std::to_string(y_header) +
                        ", where \"a/y\" is"));
  // A name of no byte in the local header: what the header is followed by would be data.
  EXPECT_THAT(data_refusal(changed(zip, 26, uint16_t{0}), "a/x"), HasSubstr("where \"\" is"));
}

TEST(ZipArchive, VerifiesChecksumsThatAreThere) {
  const auto verify = [](const std::string& zip) {
    const ZipArchive archive(as_bytes_of(zip), "a.zip");
    archive.verify(*archive.find("a/x"));
  };
  std::string zip = small_zip();
  verify(zip);
  zip[zip.find("hello")] = 'j';
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, verify(zip)),
              HasSubstr("a.zip: \"a/x\" has the checksum 1288762854, expected 907060870"));
  verify(changed(zip, directory_of(zip) + 16, uint32_t{0}));
}

TEST(ZipArchive, RefusesANameThatOccursTwice) {
  const test::TempFolder folder;
  AtomicFile file(folder.path("a.zip"));
  ZipWriter writer(file);
  writer.add("a/x", "1");
  writer.add("a/x", "2");
  writer.finish();
  file.commit();
  EXPECT_THAT(refusal(test::read_file(folder.path("a.zip"))), HasSubstr("\"a/x\" twice"));
}

TEST(ZipArchive, WritesMoreEntriesThanSixteenBitsCount) {
  const test::TempFolder folder;
  AtomicFile file(folder.path("a.zip"));
  ZipWriter writer(file);
  for (int i = 0; i < 70000; ++i) {
    writer.add(std::to_string(i), "");
  }
  writer.finish();
  file.commit();
  const MappedFile zip(folder.path("a.zip"));
  const ZipArchive archive(zip.bytes(), "a.zip");
  EXPECT_EQ(archive.entries().size(), 70000u);
  EXPECT_NE(archive.find("69999"), nullptr);
}

// Six gigabytes that are nearly all hole: an entry of five, and one that begins beyond them.
TEST(ZipArchive, ReadsEntriesBeyondFourGigabytes) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.zip");
  constexpr uint64_t kLarge = uint64_t{5} << 30;
  constexpr uint64_t kSecond = kLarge + (uint64_t{1} << 30);
  const auto put = [](std::string& text, auto value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const auto local = [&](std::string_view name) {
    std::string text = "PK\x03\x04" + std::string(22, '\0');
    put(text, static_cast<uint16_t>(name.size()));
    put(text, uint16_t{0});
    return text + std::string(name);
  };
  const auto record = [&](std::string_view name, uint64_t bytes, uint64_t offset) {
    std::string text = "PK\x01\x02" + std::string(16, '\0');
    put(text, uint32_t{0xffffffff});
    put(text, uint32_t{0xffffffff});
    put(text, static_cast<uint16_t>(name.size()));
    // A foreign field before ours: it has to be stepped over.
    put(text, uint16_t{6 + 28});
    text += std::string(10, '\0');
    put(text, uint32_t{0xffffffff});
    text += name;
    put(text, uint16_t{0x4246});
    put(text, uint16_t{2});
    text += "ZZ";
    put(text, uint16_t{1});
    put(text, uint16_t{24});
    put(text, bytes);
    put(text, bytes);
    put(text, offset);
    return text;
  };
  const std::string first = local("a/large");
  const std::string second = local("a/far") + "hello";
  std::string end = record("a/large", kLarge, 0) + record("a/far", 5, kSecond);
  const uint64_t directory_bytes = end.size();
  const uint64_t directory_offset = kSecond + second.size();
  end += "PK\x06\x06" + std::string(28, '\0');
  put(end, uint64_t{2});
  put(end, directory_bytes);
  put(end, directory_offset);
  end += "PK\x06\x07" + std::string(4, '\0');
  put(end, directory_offset + directory_bytes);
  end += std::string(4, '\0');
  end += "PK\x05\x06" + std::string(4, '\0') + std::string(12, '\xff') + std::string(2, '\0');

  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT, 0600);
  ASSERT_GE(fd, 0);
  const auto write_at = [&](const std::string& text, uint64_t offset) {
    ASSERT_EQ(::pwrite(fd, text.data(), text.size(), static_cast<off_t>(offset)),
              static_cast<ssize_t>(text.size()));
  };
  write_at(first, 0);
  write_at("Z", first.size() + kLarge - 1);
  write_at(second, kSecond);
  write_at(end, directory_offset);
  ::close(fd);

  const MappedFile file(path);
  const ZipArchive archive(file.bytes(), path);
  const auto large = archive.data(*archive.find("a/large"));
  EXPECT_EQ(large.size(), kLarge);
  EXPECT_EQ(large.back(), std::byte{'Z'});
  EXPECT_EQ(as_text(archive.data(*archive.find("a/far"))), "hello");
}

}  // namespace
}  // namespace rwkv
