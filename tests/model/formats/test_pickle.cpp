#include <random>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "model/formats/pickle.h"
#include "tests/support/test_data.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using Kind = PickleValue::Kind;
using std::string_literals::operator""s;

constexpr std::string_view kAllowed[] = {"collections.OrderedDict", "torch.FloatStorage"};

Pickle read(std::string_view text) {
  return read_pickle(
      std::as_bytes(std::span(text.data(), text.size())), "x.pth: data.pkl", kAllowed);
}

std::string refusal(std::string_view text) {
  return THROWN_TEXT(std::runtime_error, read(text));
}

// A value as text, so that a test can say what it expects in one line.
std::string show(const Pickle& pickle, PickleIndex index) {
  const PickleValue& value = pickle[index];
  const auto items = [&] {
    std::string text;
    for (const PickleIndex item : value.items) {
      text += (text.empty() ? "" : " ") + show(pickle, item);
    }
    return text;
  };
  switch (value.kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return value.integer != 0 ? "True" : "False";
    case Kind::kInteger:
      return std::to_string(value.integer);
    case Kind::kBigInteger:
      return "big:" + std::to_string(value.text.size());
    case Kind::kFloat:
      return std::to_string(value.real);
    case Kind::kText:
      return "'" + std::string(value.text) + "'";
    case Kind::kBytes:
      return "b'" + std::string(value.text) + "'";
    case Kind::kTuple:
      return "(" + items() + ")";
    case Kind::kList:
      return "[" + items() + "]";
    case Kind::kDict:
      return "{" + items() + "}";
    case Kind::kGlobal:
      return "<" + std::string(value.text) + ">";
    case Kind::kCall:
      return "call(" + items() + ")";
    case Kind::kPersistent:
      return "id(" + items() + ")";
  }
  return "?";
}

std::string shown(std::string_view text) {
  const Pickle pickle = read(text);
  EXPECT_EQ(pickle.bytes_read, text.size());
  return show(pickle, pickle.root);
}

TEST(Pickle, ReadsNumbers) {
  EXPECT_EQ(shown("\x80\x02K\xff."), "255");
  EXPECT_EQ(shown("\x80\x02M\xff\xff."), "65535");
  EXPECT_EQ(shown("\x80\x02J\xfe\xff\xff\xff."), "-2");
  EXPECT_EQ(shown("\x80\x02\x8a\x00."s), "0");
  EXPECT_EQ(shown("\x80\x02\x8a\x01\xff."), "-1");
  EXPECT_EQ(shown("\x80\x02\x8a\x05\x00\x00\x00\x80\x00."s), "2147483648");
  EXPECT_EQ(shown("\x80\x02\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80."s), "-9223372036854775808");
  EXPECT_EQ(shown("\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."), "big:10");
  EXPECT_EQ(shown("\x80\x02G\xbf\xf8\x00\x00\x00\x00\x00\x00."s), "-1.500000");
  EXPECT_EQ(shown("\x80\x02\x88\x89N\x87."), "(True False None)");
}

TEST(Pickle, ReadsTextOfEveryLengthPrefix) {
  EXPECT_EQ(shown("\x80\x02X\x02\x00\x00\x00hi."s), "'hi'");
  EXPECT_EQ(shown("\x80\x04\x8c\x02hi."), "'hi'");
  EXPECT_EQ(shown("\x80\x04\x8d\x02\x00\x00\x00\x00\x00\x00\x00hi."s), "'hi'");
  EXPECT_EQ(shown("\x80\x02U\x02hi."), "'hi'");
  EXPECT_EQ(shown("\x80\x02T\x02\x00\x00\x00hi."s), "'hi'");
  EXPECT_EQ(shown("\x80\x03"
                  "C\x02hi."),
            "b'hi'");
  EXPECT_EQ(shown("\x80\x03"
                  "B\x02\x00\x00\x00hi."s),
            "b'hi'");
  EXPECT_EQ(shown("\x80\x04\x8e\x02\x00\x00\x00\x00\x00\x00\x00hi."s), "b'hi'");
}

TEST(Pickle, ReadsContainersAndSharedValues) {
  EXPECT_EQ(shown("\x80\x02]K\x01"
                  "a(K\x02K\x03"
                  "e."),
            "[1 2 3]");
  EXPECT_EQ(shown("\x80\x02}K\x01K\x02s(K\x03K\x04K\x05K\x06u."), "{1 2 3 4 5 6}");
  EXPECT_EQ(shown("\x80\x02(K\x01)\x85t."), "(1 (()))");
  EXPECT_EQ(shown("\x80\x02]q\x05K\x07"
                  "ah\x05\x86."s),
            "([7] [7])");
  EXPECT_EQ(shown("\x80\x04\x8c\x01x\x94h\x00\x86."s), "('x' 'x')");
  EXPECT_EQ(shown("\x80\x02K\x01r\x00\x01\x00\x00j\x00\x01\x00\x00\x86."s), "(1 1)");
  EXPECT_EQ(shown("\x80\x02K\x01"
                  "2\x86."),
            "(1 1)");
  EXPECT_EQ(shown("\x80\x02K\x01K\x02"
                  "0(K\x03"
                  "1(0."),
            "1");
  EXPECT_EQ(shown("\x80\x04\x95\x03\x00\x00\x00\x00\x00\x00\x00K\x01."s), "1");
}

TEST(Pickle, DescribesCallsAndRunsNothing) {
  EXPECT_EQ(shown("\x80\x02"
                  "ctorch\nFloatStorage\nK\x01\x85R."),
            "call(<torch.FloatStorage> (1))");
  EXPECT_EQ(shown("\x80\x04\x8c\x05torch\x8c\x0c"
                  "FloatStorage\x93K\x01\x85\x81."),
            "call(<torch.FloatStorage> (1))");
  EXPECT_EQ(shown("\x80\x02K\x05\x85Q."), "id((5))");
  EXPECT_EQ(shown("\x80\x02"
                  "ccollections\nOrderedDict\n)RK\x01K\x02s}b."),
            "{1 2}");
}

TEST(Pickle, RefusesOtherGlobalsByName) {
  EXPECT_THAT(refusal("\x80\x02"
                      "cos\nsystem\nX\x02\x00\x00\x00ls\x85R."s),
              AllOf(HasSubstr("x.pth: data.pkl wants os.system, which a state dict does not need; "
                              "refused"),
                    HasSubstr("state_dict()")));
  EXPECT_THAT(refusal("\x80\x04\x8c\x08"
                      "builtins\x8c\x04"
                      "eval\x93."),
              HasSubstr("wants builtins.eval,"));
  // Not by prefix or suffix either.
  EXPECT_THAT(refusal("\x80\x02"
                      "ctorch\nFloatStorageX\n."),
              HasSubstr("torch.FloatStorageX"));
  EXPECT_THAT(refusal("\x80\x02"
                      "ctorch\nFloat\n."),
              HasSubstr("wants torch.Float,"));
  EXPECT_THAT(refusal("\x80\x02"
                      "c\n\n."),
              HasSubstr("wants .,"));
  // What a hostile file prints stays short and plain.
  EXPECT_LT(refusal("\x80\x02"
                    "c\x1b[2J" +
                    std::string(100000, 'x') + "\ny\n.")
                .size(),
            400u);
  EXPECT_THAT(refusal("\x80\x02"
                      "c\x1b[2J\ny\n."),
              HasSubstr("\\x1b[2J.y"));
}

TEST(Pickle, RefusesAStackThatGrowsWithoutEnd) {
  EXPECT_THAT(refusal("\x80\x02" + std::string((1 << 20) + 1, 'N')),
              HasSubstr("more than 1048576 values wait on the stack"));
  // The items of a list may come in portions, as Python writes them.
  std::string list = "\x80\x02]";
  for (int portion = 0; portion < 8; ++portion) {
    list += "(" + std::string(1 << 18, 'N') + "e";
  }
  const Pickle pickle = read(list + ".");
  EXPECT_EQ(pickle[pickle.root].items.size(), size_t{8} << 18);
}

TEST(Pickle, RefusesOtherOpcodesByName) {
  EXPECT_THAT(refusal("\x80\x02(ios\nsystem\n."), HasSubstr("wants the pickle opcode INST,"));
  EXPECT_THAT(refusal("\x80\x02\x82\x01."), HasSubstr("wants the pickle opcode EXT1,"));
  EXPECT_THAT(refusal("\x80\x02P1\n."), HasSubstr("wants the pickle opcode PERSID,"));
  EXPECT_THAT(refusal("\x80\x04\x8f."), HasSubstr("EMPTY_SET"));
  EXPECT_THAT(refusal("\x80\x02\xff."), HasSubstr("there is no opcode 255"));
  EXPECT_THAT(refusal("\x80\x06N."), HasSubstr("the protocol is 6, expected 2 to 5"));
}

TEST(Pickle, RefusesBrokenRules) {
  EXPECT_THAT(refusal(""), HasSubstr("cut short"));
  EXPECT_THAT(refusal("\x80\x02."), HasSubstr("0 values on the stack"));
  EXPECT_THAT(refusal("\x80\x02NN."), HasSubstr("2 values on the stack"));
  EXPECT_THAT(refusal("\x80\x02(N."), HasSubstr("ends with"));
  EXPECT_THAT(refusal("\x80\x02t."), HasSubstr("wants a mark"));
  EXPECT_THAT(refusal("\x80\x02N\x86."), HasSubstr("wants 2 values"));
  EXPECT_THAT(refusal("\x80\x02N(\x85."), HasSubstr("wants 1 values where there are 0"));
  EXPECT_THAT(refusal("\x80\x02"
                      "0."),
              HasSubstr("wants a value"));
  EXPECT_THAT(refusal("\x80\x02"
                      "2."),
              HasSubstr("wants a value"));
  EXPECT_THAT(refusal("\x80\x02q\x00."s), HasSubstr("wants a value"));
  EXPECT_THAT(refusal("\x80\x02h\x00."s), HasSubstr("memo 0, which was never set"));
  EXPECT_THAT(refusal("\x80\x02NN"
                      "a."),
              HasSubstr("no container"));
  EXPECT_THAT(refusal("\x80\x02](N(u."), HasSubstr("no container"));
  EXPECT_THAT(refusal("\x80\x02}(Nu."), HasSubstr("no container"));
  EXPECT_THAT(refusal("\x80\x02)NNs."), HasSubstr("no container"));
  EXPECT_THAT(refusal("\x80\x02N)R."), HasSubstr("is called that is not a global"));
  EXPECT_THAT(refusal("\x80\x02"
                      "ctorch\nFloatStorage\nNR."),
              HasSubstr("is called"));
  EXPECT_THAT(refusal("\x80\x02K\x01K\x02\x93."), HasSubstr("not named by text"));
  EXPECT_THAT(refusal("\x80\x02"
                      "ctorch"),
              HasSubstr("a line does not end"));
  EXPECT_THAT(refusal("\x80\x02X\xff\xff\xff\xffhi."),
              HasSubstr("4294967295 bytes where 3 are left"));
  EXPECT_THAT(refusal("\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\xffhi."), HasSubstr("cut short"));
}

TEST(Pickle, BoundsNestingValuesAndMemo) {
  std::string pushed_and_popped;
  while (pushed_and_popped.size() <= size_t{64} << 20) {
    pushed_and_popped += "N0";
  }
  EXPECT_THAT(refusal("\x80\x02" + std::string(257, '(')), HasSubstr("deeper than 256"));
  EXPECT_THAT(refusal("\x80\x02" + std::string(1 << 21, ']')),
              HasSubstr("more than 1048576 values"));
  EXPECT_THAT(refusal("\x80\x04N" + std::string(1 << 21, '\x94')),
              HasSubstr("more than 1048576 memo entries"));
  EXPECT_THAT(refusal("\x80\x02" + pushed_and_popped), HasSubstr("beyond 67108864 bytes"));
}

TEST(Pickle, ValuesThatHoldThemselvesOrDoubleCostNothing) {
  std::string itself =
      "\x80\x02]q\x00h\x00"
      "a."s;
  const Pickle cycle = read(itself);
  EXPECT_EQ(cycle[cycle.root].items[0], cycle.root);
  // 100,000 tuples of the one before twice: 2^100000 leaves, if they were walked or copied.
  std::string doubling = "\x80\x02)";
  for (int i = 0; i < 100000; ++i) {
    doubling += "2\x86";
  }
  EXPECT_LT(read(doubling + ".").values.size(), 100010u);
}

TEST(Pickle, StopsWhereThePickleStops) {
  const Pickle pickle = read("\x80\x02K\x01.and more");
  EXPECT_EQ(pickle.bytes_read, 5u);
}

TEST(PickleWriter, WritesWhatTheReaderReads) {
  PickleWriter writer;
  writer.global("collections", "OrderedDict");
  writer.empty_tuple();
  writer.call();
  writer.text("n\xc3\xa4me");
  writer.mark();
  for (const int64_t value : {int64_t{0},
                              int64_t{255},
                              int64_t{256},
                              int64_t{65536},
                              int64_t{-1},
                              int64_t{1} << 31,
                              int64_t{-1} << 40,
                              INT64_MAX}) {
    writer.integer(value);
  }
  writer.boolean(true);
  writer.boolean(false);
  writer.tuple();
  writer.persistent();
  writer.set_item();
  EXPECT_EQ(shown(writer.finish()),
            "{'n\xc3\xa4me' id((0 255 256 65536 -1 2147483648 -1099511627776 9223372036854775807 "
            "True False))}");
}

}  // namespace
}  // namespace rwkv
