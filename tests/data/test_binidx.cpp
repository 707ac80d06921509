#include <algorithm>
#include <cstring>
#include <functional>
#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "data/binidx.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

using Documents = std::vector<std::vector<int32_t>>;

const Documents kTiny3 = {{74, 5229}, {33, 34, 35, 36}, {261}};
const TokenizerRecord kWorld = {
    .identity = "world:0", .vocab_size = 65536, .end_of_document = 0, .text_bytes = 0};

void write_corpus(const std::string& prefix,
                  const Documents& documents,
                  const TokenizerRecord& record = kWorld) {
  BinidxWriter writer(prefix, record);
  for (const auto& document : documents) {
    writer.add_tokens(document);
    writer.end_document();
  }
  writer.finish(record.text_bytes);
}

std::vector<int64_t> all_tokens(const BinidxFile& file) {
  std::vector<int64_t> ids(static_cast<size_t>(file.num_tokens()));
  file.read(0, ids);
  return ids;
}

// An index as another program writes it; each part can be made wrong.
struct RawIndex {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t dtype = 8;
  std::vector<int32_t> sizes;
  std::vector<int64_t> offsets;
  std::vector<int64_t> marks;
  std::string trailing;

  std::string bytes() const {
    std::string out = magic;
    const auto put = [&out](auto value) {
      out.append(reinterpret_cast<const char*>(&value), sizeof value);
    };
    put(version);
    put(dtype);
    put(static_cast<uint64_t>(sizes.size()));
    put(static_cast<uint64_t>(marks.size()));
    std::for_each(sizes.begin(), sizes.end(), put);
    std::for_each(offsets.begin(), offsets.end(), put);
    std::for_each(marks.begin(), marks.end(), put);
    return out + trailing;
  }
};

RawIndex tiny3_index() {
  RawIndex index;
  index.sizes = {3, 5, 2};
  index.offsets = {0, 6, 16};
  index.marks = {0, 1, 2, 3};
  return index;
}

TEST(BinidxWriter, WritesTheWorkedExampleByteForByte) {
  const std::string golden = test::find_test_data("derived/binidx/tiny3.idx");
  SKIP_WITHOUT(golden);
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  EXPECT_EQ(test::read_file(folder.path("a.idx")), test::read_file(golden));
  EXPECT_EQ(test::read_file(folder.path("a.bin")),
            test::read_file(test::find_test_data("derived/binidx/tiny3.bin")));
  EXPECT_EQ(test::read_file(folder.path("a.idx")), tiny3_index().bytes());
  EXPECT_THAT(folder.files(), ElementsAre("a.bin", "a.idx", "a.tokenizer.json"));
}

TEST(Binidx, CopiesTheDemoCorpusByteForByte) {
  const std::string golden = test::find_test_data("derived/binidx/demo_world_noshuffle.idx");
  SKIP_WITHOUT(golden);
  const BinidxFile file(golden);
  EXPECT_EQ(file.num_documents(), 182);
  EXPECT_EQ(file.num_tokens(), 66833);
  EXPECT_EQ(file.dtype(), TokenDtype::kU16);
  EXPECT_FALSE(file.tokenizer_record().has_value());
  const test::TempFolder folder;
  BinidxWriter writer(folder.path("copy"), kWorld);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < file.num_documents(); ++i) {
    ids.resize(static_cast<size_t>(file.document_end(i) - file.document_begin(i)));
    file.read(file.document_begin(i), ids);
    EXPECT_EQ(ids.back(), 0);
    writer.add_tokens(std::vector<int32_t>(ids.begin(), ids.end() - 1));
    writer.end_document();
  }
  writer.finish(301320);
  EXPECT_TRUE(test::read_file(folder.path("copy.idx")) == test::read_file(golden));
  EXPECT_TRUE(test::read_file(folder.path("copy.bin")) == test::read_file(file.prefix() + ".bin"));
}

TEST(Binidx, ReadsWhatItWrote) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3, {"world:12", 65536, 0, 99});
  for (const char* name : {"a", "a.bin", "a.idx"}) {
    const BinidxFile file(folder.path(name));
    EXPECT_EQ(file.prefix(), folder.path("a"));
    EXPECT_EQ(file.num_documents(), 3);
    EXPECT_THAT(all_tokens(file), ElementsAre(74, 5229, 0, 33, 34, 35, 36, 0, 261, 0));
    EXPECT_EQ(file.document_begin(1), 3);
    EXPECT_EQ(file.document_end(1), 8);
    EXPECT_EQ(file.document_end(2), 10);
    ASSERT_TRUE(file.tokenizer_record().has_value());
    EXPECT_EQ(file.tokenizer_record()->identity, "world:12");
    EXPECT_EQ(file.tokenizer_record()->vocab_size, 65536);
    EXPECT_EQ(file.tokenizer_record()->end_of_document, 0);
    EXPECT_EQ(file.tokenizer_record()->text_bytes, 99);
  }
}

TEST(Binidx, CarriesATokenizerWithoutEndOfDocument) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), {{1, 2}, {3}}, {"sentencepiece:1", 300, std::nullopt, 5});
  const BinidxFile file(folder.path("a"));
  EXPECT_THAT(all_tokens(file), ElementsAre(1, 2, 3));
  EXPECT_FALSE(file.tokenizer_record()->end_of_document.has_value());
}

TEST(BinidxWriter, TakesTwoBytesATokenUpToAVocabularyOf65536) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), {{65535}}, {"x", 65536, 0, 1});
  write_corpus(folder.path("b"), {{65536}}, {"x", 65537, 0, 1});
  EXPECT_EQ(BinidxFile(folder.path("a")).dtype(), TokenDtype::kU16);
  EXPECT_EQ(BinidxFile(folder.path("b")).dtype(), TokenDtype::kI32);
  EXPECT_THAT(all_tokens(BinidxFile(folder.path("a"))), ElementsAre(65535, 0));
  EXPECT_THAT(all_tokens(BinidxFile(folder.path("b"))), ElementsAre(65536, 0));
}

TEST(BinidxWriter, PassesOverDocumentsWithoutTokens) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), {{}, {1}, {}, {2}, {}});
  const BinidxFile file(folder.path("a"));
  EXPECT_EQ(file.num_documents(), 2);
  EXPECT_THAT(all_tokens(file), ElementsAre(1, 0, 2, 0));
}

TEST(BinidxWriter, SplitsADocumentThatIsTooLongForAnItem) {
  const test::TempFolder folder;
  BinidxWriter writer(folder.path("a"), kWorld, 3);
  for (const auto& document : Documents{{1, 2}, {3, 4, 5}, {6}, {1, 2, 3, 4, 5, 6, 7}}) {
    writer.add_tokens(document);
    writer.end_document();
  }
  EXPECT_EQ(writer.num_documents(), 4);
  EXPECT_EQ(writer.num_tokens(), 17);
  writer.finish(1);
  RawIndex expected;
  expected.sizes = {3, 3, 1, 2, 3, 3, 2};
  expected.offsets = {0, 6, 12, 14, 18, 24, 30};
  expected.marks = {0, 1, 3, 4, 7};
  EXPECT_EQ(test::read_file(folder.path("a.idx")), expected.bytes());
  const BinidxFile file(folder.path("a"));
  EXPECT_EQ(file.num_documents(), 4);
  EXPECT_EQ(file.document_begin(3), 9);
  EXPECT_EQ(file.document_end(3), 17);
}

TEST(BinidxWriter, RefusesIdsOutsideTheVocabulary) {
  const test::TempFolder folder;
  BinidxWriter writer(folder.path("a"), {"bytes", 256, 0, 0});
  EXPECT_THAT(THROWN_TEXT(std::invalid_argument, writer.add_tokens(std::vector<int32_t>{5, 256})),
              AllOf(HasSubstr("id 256"), HasSubstr("0 to 255"), HasSubstr("bytes")));
  THROWN_TEXT(std::invalid_argument, writer.add_tokens(std::vector<int32_t>{-1}));
}

TEST(BinidxWriter, RefusesRecordsThatMakeNoSense) {
  const test::TempFolder folder;
  const std::string prefix = folder.path("a");
  EXPECT_THROW(BinidxWriter(prefix, {"", 256, 0, 0}), std::invalid_argument);
  EXPECT_THROW(BinidxWriter(prefix, {"x", 0, std::nullopt, 0}), std::invalid_argument);
  EXPECT_THROW(BinidxWriter(prefix, {"x", 256, 256, 0}), std::invalid_argument);
  EXPECT_THROW(BinidxWriter(prefix, {"x", 256, -1, 0}), std::invalid_argument);
  EXPECT_THROW(BinidxWriter(prefix, {"x", (1LL << 31) + 1, 0, 0}), std::invalid_argument);
  EXPECT_THROW(BinidxWriter(prefix, kWorld, 0), std::invalid_argument);
  EXPECT_THAT(folder.files(), ElementsAre());
}

TEST(BinidxWriter, RefusesAnEmptyCorpusAndLeavesNothing) {
  const test::TempFolder folder;
  {
    BinidxWriter writer(folder.path("a"), kWorld);
    writer.end_document();
    EXPECT_THAT(THROWN_TEXT(std::runtime_error, writer.finish(0)),
                HasSubstr("no document with a token"));
  }
  EXPECT_THAT(folder.files(), ElementsAre());
}

TEST(BinidxWriter, LeavesAnOlderCorpusAloneUntilFinish) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  const std::string old_idx = test::read_file(folder.path("a.idx"));
  {
    BinidxWriter writer(folder.path("a"), kWorld);
    writer.add_tokens(std::vector<int32_t>(1 << 20, 7));
    writer.end_document();
    EXPECT_EQ(BinidxFile(folder.path("a")).num_tokens(), 10);
  }
  EXPECT_EQ(test::read_file(folder.path("a.idx")), old_idx);
  EXPECT_THAT(folder.files(), ElementsAre("a.bin", "a.idx", "a.tokenizer.json"));
  write_corpus(folder.path("a"), {{8, 8}});
  EXPECT_THAT(all_tokens(BinidxFile(folder.path("a"))), ElementsAre(8, 8, 0));
}

// The last step fails here: the folder that stands where the side file belongs cannot be replaced.
TEST(BinidxWriter, LeavesNoReadableCorpusWhenItFailsHalfWay) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  std::filesystem::remove(folder.path("a.tokenizer.json"));
  std::filesystem::create_directory(folder.path("a.tokenizer.json"));
  BinidxWriter writer(folder.path("a"), kWorld);
  // As many tokens as the old corpus: the new .bin would fit the old .idx.
  writer.add_tokens(std::vector<int32_t>(9, 7));
  writer.end_document();
  EXPECT_THROW(writer.finish(1), std::runtime_error);
  std::filesystem::remove(folder.path("a.tokenizer.json"));
  EXPECT_THROW(BinidxFile(folder.path("a")), std::runtime_error);
}

TEST(BinidxWriter, LeavesAnOlderCorpusWholeWhereItCannotWrite) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  // The file that is written last.
  std::filesystem::create_directory(folder.path("a.idx.partial"));
  BinidxWriter writer(folder.path("a"), kWorld);
  writer.add_tokens(std::vector<int32_t>(9, 7));
  writer.end_document();
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, writer.finish(1)),
              HasSubstr("a.idx: cannot be created"));
  EXPECT_EQ(BinidxFile(folder.path("a")).num_tokens(), 10);
}

TEST(BinidxWriter, RefusesToFinishInsideADocument) {
  const test::TempFolder folder;
  BinidxWriter writer(folder.path("a"), kWorld);
  writer.add_tokens(std::vector<int32_t>{1});
  EXPECT_THROW(writer.finish(1), std::logic_error);
}

TEST(BinidxFile, ReadsEveryIntegerType) {
  const test::TempFolder folder;
  struct Case {
    uint8_t code;
    std::string bin;
    std::vector<int64_t> ids;
  };
  const std::vector<Case> cases = {
      {1, std::string("\x01\xFF", 2), {1, 255}},
      {2, std::string("\x01\xFF", 2), {1, -1}},
      {3, std::string("\x01\x00\xFE\xFF", 4), {1, -2}},
      {8, std::string("\x01\x00\xFE\xFF", 4), {1, 65534}},
      {4, std::string("\x01\x00\x00\x00\xFF\xFF\xFF\xFF", 8), {1, -1}},
      {5, std::string("\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0", 16), {1, 1LL << 32}},
  };
  for (const Case& c : cases) {
    RawIndex index;
    index.dtype = c.code;
    index.sizes = {2};
    index.offsets = {0};
    index.marks = {0, 1};
    test::write_file(folder.path("a.idx"), index.bytes());
    test::write_file(folder.path("a.bin"), c.bin);
    EXPECT_EQ(all_tokens(BinidxFile(folder.path("a"))), c.ids) << int{c.code};
  }
}

TEST(BinidxFile, ReadsAnyRangeAndRefusesOnesOutside) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  const BinidxFile file(folder.path("a"));
  std::vector<int64_t> three(3);
  file.read(2, three);
  EXPECT_THAT(three, ElementsAre(0, 33, 34));
  file.read(7, three);
  EXPECT_THAT(three, ElementsAre(0, 261, 0));
  file.read(10, {});
  EXPECT_THAT(THROWN_TEXT(std::out_of_range, file.read(8, three)),
              AllOf(HasSubstr("3 tokens from position 8"), HasSubstr("10")));
  EXPECT_THROW(file.read(-1, three), std::out_of_range);
  EXPECT_THROW(file.read(11, {}), std::out_of_range);
  EXPECT_THROW(file.read(std::numeric_limits<int64_t>::max(), three), std::out_of_range);
  EXPECT_THROW(file.document_begin(3), std::out_of_range);
  EXPECT_THROW(file.document_end(-1), std::out_of_range);
}

TEST(BinidxFile, AllowsBytesAfterTheDocumentsAndDocumentsWithoutTokens) {
  const test::TempFolder folder;
  RawIndex index;
  index.sizes = {1, 0, 2};
  index.offsets = {0, 2, 2};
  index.marks = {0, 1, 1, 3};
  index.trailing = std::string(3, '\0');
  test::write_file(folder.path("a.idx"), index.bytes());
  test::write_file(folder.path("a.bin"), "abcdef");
  const BinidxFile file(folder.path("a"));
  EXPECT_EQ(file.num_documents(), 3);
  EXPECT_EQ(file.document_begin(1), file.document_end(1));
  EXPECT_EQ(file.document_begin(2), 1);
  EXPECT_EQ(file.document_end(2), 3);
}

struct BadIndex {
  std::string name;
  std::function<void(RawIndex&)> spoil;
  std::string expected;
};

class BinidxFileIndex : public testing::TestWithParam<BadIndex> {};

TEST_P(BinidxFileIndex, IsRefusedByName) {
  const test::TempFolder folder;
  RawIndex index = tiny3_index();
  GetParam().spoil(index);
  test::write_file(folder.path("a.idx"), index.bytes());
  test::write_file(folder.path("a.bin"), std::string(20, '\0'));
  const std::string text = THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a")));
  EXPECT_THAT(text, testing::StartsWith(folder.path("a.")));
  EXPECT_THAT(text, HasSubstr(GetParam().expected));
}

INSTANTIATE_TEST_SUITE_P(
    All,
    BinidxFileIndex,
    testing::Values(
        BadIndex{"OldFormat",
                 [](RawIndex& i) { i.magic = std::string("TNTIDX\0\0x", 9); },
                 "an old TNTIDX index"},
        BadIndex{"Foreign", [](RawIndex& i) { i.magic[3] = 'X'; }, "does not start with MMIDIDX"},
        BadIndex{"Version", [](RawIndex& i) { i.version = 2; }, "version 2, expected 1"},
        BadIndex{"Float6", [](RawIndex& i) { i.dtype = 6; }, "dtype code 6 is a float type"},
        BadIndex{"Float7", [](RawIndex& i) { i.dtype = 7; }, "dtype code 7 is a float type"},
        BadIndex{"Dtype0", [](RawIndex& i) { i.dtype = 0; }, "dtype code 0 is not known"},
        BadIndex{"Dtype9", [](RawIndex& i) { i.dtype = 9; }, "dtype code 9 is not known"},
        BadIndex{"NegativeSize",
                 [](RawIndex& i) { i.sizes[1] = -5; },
                 "item 1 has -5 tokens, expected 0 or more"},
        BadIndex{"Gap",
                 [](RawIndex& i) { i.offsets[2] = 18; },
                 "item 2 starts at byte 18, but the items before it end at 16"},
        BadIndex{"StartsLate", [](RawIndex& i) { i.offsets[0] = 2; }, "item 0 starts at byte 2"},
        BadIndex{"TooManyTokens", [](RawIndex& i) { i.sizes[2] = 3; }, "(22); the copy looks cut"},
        BadIndex{"TooFewTokens", [](RawIndex& i) { i.sizes[2] = 1; }, "do not belong together"},
        BadIndex{"WiderDtype", [](RawIndex& i) { i.dtype = 4; }, "item 1 starts at byte 6"},
        BadIndex{"MarksFall",
                 [](RawIndex& i) {
                   i.marks = {0, 2, 1, 3};
                 },
                 "mark 2 is 1"},
        BadIndex{"MarkTooLarge", [](RawIndex& i) { i.marks[1] = 4; }, "mark 1 is 4"},
        BadIndex{"MarkNegative", [](RawIndex& i) { i.marks[1] = -1; }, "mark 1 is -1"},
        BadIndex{"FirstMark", [](RawIndex& i) { i.marks[0] = 1; }, "mark 0 is 1, expected 0"},
        BadIndex{"LastMark", [](RawIndex& i) { i.marks[3] = 2; }, "last document mark is 2"},
        BadIndex{"NoMarks", [](RawIndex& i) { i.marks.clear(); }, "has no document marks"}),
    [](const auto& index) { return index.param.name; });

TEST(BinidxFile, SaysHowManyBytesAreMissing) {
  const test::TempFolder folder;
  test::write_file(folder.path("a.idx"), tiny3_index().bytes());
  test::write_file(folder.path("a.bin"), std::string(18, '\0'));
  EXPECT_EQ(THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a"))),
            folder.path("a.bin") + ": 18 bytes, but " + folder.path("a.idx") +
                " lists 10 tokens of 2 bytes (20); the copy looks cut short");
}

TEST(BinidxFile, RefusesACorpusWithoutTokens) {
  const test::TempFolder folder;
  RawIndex index;
  index.marks = {0};
  test::write_file(folder.path("a.idx"), index.bytes());
  test::write_file(folder.path("a.bin"), "");
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a"))),
              HasSubstr("lists no tokens"));
  index.sizes = {0, 0};
  index.offsets = {0, 0};
  index.marks = {0, 1, 2};
  test::write_file(folder.path("a.idx"), index.bytes());
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a"))),
              HasSubstr("lists no tokens"));
}

TEST(BinidxFile, NamesTheFileThatIsMissing) {
  const test::TempFolder folder;
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a"))), HasSubstr("a.idx"));
  test::write_file(folder.path("a.idx"), tiny3_index().bytes());
  EXPECT_THAT(THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a"))), HasSubstr("a.bin"));
}

TEST(BinidxFile, RefusesAnIndexCutAtAnyLength) {
  const test::TempFolder folder;
  const std::string index = tiny3_index().bytes();
  test::write_file(folder.path("a.bin"), std::string(20, '\0'));
  for (size_t length = 0; length < index.size(); ++length) {
    test::write_file(folder.path("a.idx"), index.substr(0, length));
    ASSERT_THROW(BinidxFile(folder.path("a")), std::runtime_error) << length;
  }
  test::write_file(folder.path("a.idx"), index);
  EXPECT_EQ(BinidxFile(folder.path("a")).num_tokens(), 10);
}

// What opens must be safe to read from end to end.
TEST(BinidxFile, SurvivesWrongBytesInTheIndex) {
  const test::TempFolder folder;
  const std::string index = tiny3_index().bytes();
  test::write_file(folder.path("a.bin"), std::string(20, '\1'));
  std::mt19937 random(1);
  int opened = 0;
  for (int i = 0; i < 1000; ++i) {
    std::string broken = index;
    for (uint64_t flips = 1 + random() % 3; flips > 0; --flips) {
      broken[random() % broken.size()] ^= static_cast<char>(1 << random() % 8);
    }
    test::write_file(folder.path("a.idx"), broken);
    try {
      const BinidxFile file(folder.path("a"));
      all_tokens(file);
      for (int64_t document = 0; document < file.num_documents(); ++document) {
        ASSERT_LE(file.document_begin(document), file.document_end(document));
        ASSERT_LE(file.document_end(document), file.num_tokens());
      }
      ++opened;
    } catch (const std::runtime_error&) {
    }
  }
  // A mark that moves within bounds leaves a valid index; most damage does not.
  EXPECT_LT(opened, 300);
}

struct BadRecord {
  std::string name;
  std::string json;
  std::string expected;
};

class BinidxFileRecord : public testing::TestWithParam<BadRecord> {};

TEST_P(BinidxFileRecord, IsRefusedByName) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  test::write_file(folder.path("a.tokenizer.json"), GetParam().json);
  const std::string text = THROWN_TEXT(std::runtime_error, BinidxFile(folder.path("a")));
  EXPECT_THAT(text, testing::StartsWith(folder.path("a.tokenizer.json: ")));
  EXPECT_THAT(text, AllOf(HasSubstr(GetParam().expected), HasSubstr("tokenize the text again")));
}

std::string record_json(const std::string& vocab_size,
                        const std::string& end,
                        const std::string& num_tokens = "10",
                        const std::string& more = "") {
  return R"({"identity": "x", "vocab_size": )" + vocab_size + R"(, "end_of_document": )" + end +
         R"(, "text_bytes": 9, "num_tokens": )" + num_tokens + more + "}";
}

INSTANTIATE_TEST_SUITE_P(
    All,
    BinidxFileRecord,
    testing::Values(
        BadRecord{"Empty", "", "is not JSON"},
        BadRecord{"Cut", R"({"identity": "x")", "is not JSON"},
        BadRecord{"Array", "[]", "of type array, expected an object"},
        BadRecord{"NoIdentity", "{}", "has no string \"identity\""},
        BadRecord{"IdentityIsANumber", R"({"identity": 1})", "has no string \"identity\""},
        BadRecord{"IdentityTooLong",
                  R"({"identity": ")" + std::string(201, 'x') + "\"}",
                  "\"identity\" has 201 bytes, expected at most 200"},
        BadRecord{"NoVocabSize", R"({"identity": "x"})", "has no key \"vocab_size\""},
        BadRecord{"VocabSizeIsText", record_json("\"9\"", "0"), "\"vocab_size\" is \"9\""},
        BadRecord{"VocabSizeIsAFraction", record_json("9.5", "0"), "\"vocab_size\" is 9.5"},
        BadRecord{"VocabSizeZero", record_json("0", "0"), "\"vocab_size\" is 0"},
        BadRecord{
            "VocabSizePast63Bits", record_json("18446744073709551615", "0"), "\"vocab_size\""},
        BadRecord{"EndOutside", record_json("9", "9"), "\"end_of_document\" is 9, expected"},
        BadRecord{"OtherCorpus", record_json("9", "0", "11"), "of 11 tokens, but this one has 10"},
        BadRecord{"KeyTwice",
                  record_json("9", "0", "10", ", \"num_tokens\": 10"),
                  "\"num_tokens\" twice"},
        BadRecord{"DeepNesting", std::string(100000, '['), "nested deeper than 64 levels"},
        BadRecord{"UnknownKey", record_json("9", "0", "10", ", \"more\": 1"), "\"more\""}),
    [](const auto& record) { return record.param.name; });

TEST(BinidxFile, AcceptsARecordWrittenByHand) {
  const test::TempFolder folder;
  write_corpus(folder.path("a"), kTiny3);
  test::write_file(folder.path("a.tokenizer.json"), record_json("9", "null"));
  EXPECT_EQ(BinidxFile(folder.path("a")).tokenizer_record()->vocab_size, 9);
}

}  // namespace
}  // namespace rwkv
