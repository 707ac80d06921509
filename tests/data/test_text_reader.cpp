#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>
#include <zstd.h>

#include "data/number_text.h"
#include "data/text_reader.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

std::string gzip(const std::string& text) {
  z_stream stream{};
  deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  return out;
}

std::string zstd(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::vector<std::string> read_documents(std::vector<std::string> paths,
                                        TextReader::Options options = {}) {
  TextReader reader(std::move(paths), std::move(options));
  std::vector<std::string> documents;
  std::string open;
  for (TextPiece piece; reader.next(piece);) {
    EXPECT_FALSE(piece.text.empty());
    open += piece.text;
    if (piece.ends_document) {
      documents.push_back(std::exchange(open, ""));
    }
  }
  EXPECT_EQ(open, "") << "the last piece of a file must end its document";
  EXPECT_EQ(reader.bytes_read(), reader.bytes_total());
  TextPiece piece;
  EXPECT_FALSE(reader.next(piece));
  return documents;
}

std::vector<std::string> read_content(const std::string& name, const std::string& content) {
  const test::TempFolder folder;
  test::write_file(folder.path(name), content);
  return read_documents({folder.path(name)});
}

std::string random_text(size_t bytes) {
  std::mt19937_64 random(bytes);
  std::string text(bytes, '\0');
  for (char& c : text) {
    c = static_cast<char>(random() % 256);
  }
  // Random bytes must not look like a byte order mark.
  text.front() = 'x';
  return text;
}

TEST(Grouped, SetsThousandsApart) {
  EXPECT_EQ(grouped(0), "0");
  EXPECT_EQ(grouped(999), "999");
  EXPECT_EQ(grouped(1000), "1,000");
  EXPECT_EQ(grouped(1498226207), "1,498,226,207");
}

TEST(TextReader, GivesATxtFileByteForByteAsOneDocument) {
  constexpr size_t kMiB = size_t{1} << 20;
  for (const size_t bytes : {size_t{1}, kMiB - 1, kMiB, kMiB + 1, 2 * kMiB, 3 * kMiB + 7}) {
    const std::string text = random_text(bytes);
    for (const auto& [name, content] : std::vector<std::pair<std::string, std::string>>{
             {"a.txt", text}, {"a.txt.gz", gzip(text)}, {"a.txt.zst", zstd(text)}}) {
      const auto documents = read_content(name, content);
      ASSERT_EQ(documents.size(), 1u) << name << " of " << bytes;
      EXPECT_TRUE(documents[0] == text) << name << " of " << bytes;
    }
  }
}

TEST(TextReader, GivesPiecesOfAMegabyteAtMost) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.txt"), random_text(3'000'000));
  TextReader reader({folder.path("a.txt")}, {});
  int pieces = 0;
  for (TextPiece piece; reader.next(piece); ++pieces) {
    EXPECT_LE(piece.text.size(), size_t{1} << 20);
    EXPECT_EQ(piece.ends_document, pieces == 2);
  }
  EXPECT_EQ(pieces, 3);
}

TEST(TextReader, GivesARowOfJsonlAsADocument) {
  EXPECT_THAT(
      read_content("a.jsonl",
                   "{\"text\": \"one\"}\n"
                   "{\"id\": 7, \"text\": \"two\\nlines \\u00e9\\ud83d\\ude00\", \"m\": {}}\n"
                   "{\"text\":\"no newline at the end\"}"),
      ElementsAre("one", "two\nlines \xC3\xA9\xF0\x9F\x98\x80", "no newline at the end"));
}

TEST(TextReader, TakesTheTextFromTheKeyAskedFor) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl"), "{\"text\": \"no\", \"content\": \"yes\"}\n");
  EXPECT_THAT(read_documents({folder.path("a.jsonl")}, {.jsonl_key = "content"}),
              ElementsAre("yes"));
}

TEST(TextReader, PassesOverEmptyRowsAndEmptyDocuments) {
  EXPECT_THAT(read_content("a.jsonl", "\n  \t\n{\"text\":\"\"}\r\n\r\n{\"text\":\"a\"}\n\n\n"),
              ElementsAre("a"));
  EXPECT_THAT(read_content("a.jsonl", ""), ElementsAre());
  EXPECT_THAT(read_content("a.jsonl", "\n"), ElementsAre());
  EXPECT_THAT(read_content("a.txt", ""), ElementsAre());
  EXPECT_THAT(read_content("a.txt.gz", gzip("")), ElementsAre());
  EXPECT_THAT(read_content("a.jsonl.zst", zstd("")), ElementsAre());
}

TEST(TextReader, AcceptsLinesThatEndInCrLf) {
  EXPECT_THAT(read_content("a.jsonl", "{\"text\":\"a\"}\r\n{\"text\":\"b\"}\r\n"),
              ElementsAre("a", "b"));
}

TEST(TextReader, LeavesOutAByteOrderMarkAtTheStartOfAFileOnly) {
  EXPECT_THAT(read_content("a.txt", "\xEF\xBB\xBFone\xEF\xBB\xBFtwo"),
              ElementsAre("one\xEF\xBB\xBFtwo"));
  EXPECT_THAT(read_content("a.txt", "\xEF\xBB\xBF"), ElementsAre());
  EXPECT_THAT(read_content("a.jsonl", "\xEF\xBB\xBF{\"text\":\"a\"}\n"), ElementsAre("a"));
  EXPECT_THAT(read_content("a.jsonl.gz", gzip("\xEF\xBB\xBF{\"text\":\"a\"}\n")), ElementsAre("a"));
}

TEST(TextReader, ReadsRowsThatSpanManyReads) {
  std::string file;
  std::vector<std::string> texts;
  for (const size_t bytes : {1u << 20, 5u, 3'000'000u, (1u << 20) - 12, 1u}) {
    texts.emplace_back(bytes, static_cast<char>('a' + texts.size()));
    file += "{\"text\":\"" + texts.back() + "\"}\n";
  }
  EXPECT_TRUE(read_content("a.jsonl", file) == texts);
  EXPECT_TRUE(read_content("a.jsonl.gz", gzip(file)) == texts);
  EXPECT_TRUE(read_content("a.jsonl.zst", zstd(file)) == texts);
}

TEST(TextReader, ReadsGzipMembersAndZstdFramesThatFollowOneAnother) {
  const std::string one = "{\"text\":\"o";
  const std::string two = "ne\"}\n{\"text\":\"two\"}";
  EXPECT_THAT(read_content("a.jsonl.gz", gzip(one) + gzip("") + gzip(two)),
              ElementsAre("one", "two"));
  EXPECT_THAT(read_content("a.jsonl.zst", zstd(one) + zstd("") + zstd(two)),
              ElementsAre("one", "two"));
}

TEST(TextReader, ReadsFilesInTheOrderGiven) {
  const test::TempFolder folder;
  test::write_file(folder.path("1.txt"), "plain");
  test::write_file(folder.path("2.jsonl.gz"), gzip("{\"text\":\"a\"}\n{\"text\":\"b\"}"));
  test::write_file(folder.path("3.txt"), "");
  test::write_file(folder.path("4.txt.zst"), zstd("last"));
  EXPECT_THAT(read_documents({folder.path("4.txt.zst"),
                              folder.path("2.jsonl.gz"),
                              folder.path("3.txt"),
                              folder.path("1.txt")}),
              ElementsAre("last", "a", "b", "plain"));
}

TEST(TextReader, ReadsAllDocumentsOfTheDemoCorpus) {
  const std::string path = test::find_test_data("corpora/rwkv-lm-demo/demo.jsonl");
  SKIP_WITHOUT(path);
  EXPECT_EQ(read_documents({path}).size(), 182u);
}

struct BadRow {
  std::string name;
  std::string row;
  std::string expected;
};

class TextReaderRows : public testing::TestWithParam<BadRow> {};

TEST_P(TextReaderRows, AreRefusedWithFileAndLine) {
  const test::TempFolder folder;
  const std::string path = folder.path("a.jsonl");
  test::write_file(path, "{\"text\":\"fine\"}\n\n" + GetParam().row + "\n{\"text\":\"after\"}\n");
  TextReader reader({path}, {});
  TextPiece piece;
  ASSERT_TRUE(reader.next(piece));
  const std::string text = THROWN_TEXT(std::runtime_error, reader.next(piece));
  EXPECT_THAT(text, testing::StartsWith(path + ":3: "));
  EXPECT_THAT(text, HasSubstr(GetParam().expected));
}

INSTANTIATE_TEST_SUITE_P(
    All,
    TextReaderRows,
    testing::Values(
        BadRow{"NotJson", "hello", "not JSON"},
        BadRow{"Cut", "{\"text\":\"a", "not JSON"},
        BadRow{"TwoObjects", "{\"text\":\"a\"}{\"text\":\"b\"}", "not JSON"},
        BadRow{"BrokenAfterTheText", "{\"text\":\"a\", \"n\": nope}", "not JSON"},
        BadRow{"Array", "[\"text\"]", "the row is an array; expected an object"},
        BadRow{"String", "\"text\"", "the row is a string"},
        BadRow{"NoKey", R"({"title":"a","body":"b"})", R"(no key "text", but "title", "body")"},
        BadRow{"NoKeyAtAll", "{}", "no key at all"},
        BadRow{"Number", R"({"text":1.5})", "\"text\" is a number; expected a string"},
        BadRow{"Null", R"({"text":null})", "\"text\" is null"},
        BadRow{"Twice", R"({"text":"a","text":"b"})", "twice"},
        BadRow{"BadUtf8", "{\"text\":\"\xFF\"}", "not valid UTF-8"},
        BadRow{"HalfASurrogatePair", R"({"text":"\ud800"})", "not JSON"},
        BadRow{"ByteOrderMarkInside", "\xEF\xBB\xBF{\"text\":\"a\"}", "not JSON"}),
    [](const auto& row) { return row.param.name; });

TEST(TextReader, RefusesARowThatIsTooLong) {
  const test::TempFolder folder;
  const std::string row = "{\"text\":\"" + std::string(89, 'x') + "\"}";
  test::write_file(folder.path("a.jsonl"), row + "\n" + row + " \n");
  TextReader reader({folder.path("a.jsonl")}, {.max_row_bytes = 100});
  TextPiece piece;
  ASSERT_TRUE(reader.next(piece)) << "100 bytes are allowed";
  const std::string text = THROWN_TEXT(std::runtime_error, reader.next(piece));
  EXPECT_THAT(text, HasSubstr("a.jsonl:2: the row is longer than 100 bytes"));
}

TEST(TextReader, StopsAtTheLimitInAFileWithoutLineEnds) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.jsonl.zst"), zstd(std::string(80u << 20, ' ')));
  TextReader reader({folder.path("a.jsonl.zst")}, {});
  TextPiece piece;
  const std::string text = THROWN_TEXT(std::runtime_error, reader.next(piece));
  EXPECT_THAT(text, HasSubstr("a.jsonl.zst:1: the row is longer than 67,108,864 bytes"));
}

TEST(TextReader, NamesEndingsItKnowsForOneItDoesNot) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.csv"), "a");
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, TextReader({folder.path("a.csv")}, {})),
              AllOf(HasSubstr("a.csv"), HasSubstr(".txt, .txt.gz"), HasSubstr(".jsonl.zst")));
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, TextReader({}, {})), HasSubstr("no text files"));
}

TEST(TextReader, RefusesAtStartAFileThatIsNotThere) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.txt"), "a");
  std::filesystem::create_directory(folder.path("d.txt"));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error,
                          TextReader({folder.path("a.txt"), folder.path("none.txt")}, {})),
              AllOf(HasSubstr("none.txt"), HasSubstr("No such file")));
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, TextReader({folder.path("d.txt")}, {})),
              HasSubstr("is a directory"));
}

// Reads the whole content, which must either work or throw std::runtime_error with the path.
bool reads_to_the_end(const std::string& path) {
  try {
    TextReader reader({path}, {});
    for (TextPiece piece; reader.next(piece);) {
    }
    return true;
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), testing::StartsWith(path + ":"));
    return false;
  }
}

TEST(TextReader, RefusesACompressedStreamCutAnywhere) {
  const test::TempFolder folder;
  const std::string text = random_text(300);
  for (const auto& [name, content] : std::vector<std::pair<std::string, std::string>>{
           {"a.txt.gz", gzip(text)}, {"a.txt.zst", zstd(text)}}) {
    for (size_t length = 0; length < content.size(); ++length) {
      test::write_file(folder.path(name), content.substr(0, length));
      ASSERT_FALSE(reads_to_the_end(folder.path(name))) << name << " cut to " << length;
    }
    test::write_file(folder.path(name), content);
    EXPECT_TRUE(reads_to_the_end(folder.path(name)));
    test::write_file(folder.path(name), content + "rubbish");
    EXPECT_FALSE(reads_to_the_end(folder.path(name)));
  }
}

// The header of a frame whose window is 2 to the power of `window_log`, and an empty last block.
std::string zstd_frame(int window_log) {
  return std::string("\x28\xb5\x2f\xfd\0", 5) + static_cast<char>((window_log - 10) << 3) +
         std::string("\1\0\0", 3);
}

TEST(TextReader, TakesNoMoreMemoryForAWindowThanAFileOfItsSizeCanUse) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.txt.zst"), zstd_frame(27));
  EXPECT_TRUE(reads_to_the_end(folder.path("a.txt.zst")));
  test::write_file(folder.path("a.txt.zst"), zstd_frame(31));
  TextReader reader({folder.path("a.txt.zst")}, {});
  TextPiece piece;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, reader.next(piece)),
              AllOf(HasSubstr("a.txt.zst: the zstd stream wants a window far larger"),
                    HasSubstr("9 bytes"),
                    HasSubstr("without --long")));
  // A file of 128 MiB, most of it a hole, may be of `zstd --long=31`.
  std::filesystem::resize_file(folder.path("a.txt.zst"), 128 << 20);
  TextReader large({folder.path("a.txt.zst")}, {});
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, large.next(piece)), HasSubstr("corrupt"));
}

TEST(TextReader, SurvivesCompressedStreamsWithWrongBytes) {
  const test::TempFolder folder;
  const std::string text = random_text(1000);
  std::mt19937 random(1);
  for (const auto& [name, content] : std::vector<std::pair<std::string, std::string>>{
           {"a.txt.gz", gzip(text)}, {"a.txt.zst", zstd(text)}}) {
    for (int i = 0; i < 300; ++i) {
      std::string broken = content;
      broken[random() % broken.size()] ^= static_cast<char>(1 + random() % 255);
      test::write_file(folder.path(name), broken);
      reads_to_the_end(folder.path(name));
    }
  }
}

}  // namespace
}  // namespace rwkv
