#include <cmath>
#include <limits>
#include <stdexcept>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/test_data.h"
#include "train/config_file.h"
#include "train/config_value.h"

namespace rwkv {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

enum class Colour { kRed, kGreen };

// One field of every type.
struct Sample {
  int64_t n_embd = 8;
  int64_t head_size = 0;
  double rate = 0.1;
  bool verbose = false;
  std::string name = "none";
  std::vector<std::string> files = {};
  std::optional<int64_t> seed = {};
  std::optional<double> epochs = {};
  std::optional<std::string> note = {};
  Colour colour = Colour::kRed;
  std::optional<int64_t> total_steps = {};
  std::optional<int64_t> total_tokens = {};
  bool operator==(const Sample&) const = default;
};

std::vector<ConfigSection> table_of(Sample& s) {
  return {
      {"model",
       {{"n_embd", &s.n_embd, "width"}, {"head_size", AbsentIfZero{&s.head_size}, "of a head"}}},
      {"run",
       {{"rate", &s.rate, "a number"},
        {"verbose", &s.verbose, "yes or no"},
        {"name", &s.name, "a name"},
        {"files", &s.files, "paths"},
        {"seed", &s.seed, "any"},
        {"epochs", &s.epochs, "any"},
        {"note", &s.note, "any"},
        {"colour",
         by_name<Colour>(&s.colour, {{"red", Colour::kRed}, {"green", Colour::kGreen}}),
         "red or green"},
        {"total_steps", &s.total_steps, "steps", OnResume::kMayDiffer, "length"},
        {"total_tokens", &s.total_tokens, "tokens", OnResume::kMayDiffer, "length"}}},
  };
}

// The error of reading `text`.
std::string read_error(const std::string& text) {
  Sample s;
  ConfigReader reader(table_of(s));
  return THROWN_TEXT(std::invalid_argument, reader.read(text, "a.toml"));
}

std::string option_error(const std::string& option) {
  Sample s;
  ConfigReader reader(table_of(s));
  return THROWN_TEXT(std::invalid_argument, reader.apply_option(option));
}

Sample with_option(const std::string& option) {
  Sample s;
  ConfigReader(table_of(s)).apply_option(option);
  return s;
}

TEST(ConfigReader, ReadsEveryType) {
  Sample s;
  ConfigReader(table_of(s))
      .read(R"(# a comment
[model]
n_embd = 1_024  # another
head_size = 64

[run]
rate = 1e-3
verbose = true
name = "größe \"x\"\n"
files = ["a", 'b\c']
seed = -5
epochs = 2
note = ""
colour = "green"
)",
            "a.toml");
  const Sample expected = {.n_embd = 1024,
                           .head_size = 64,
                           .rate = 1e-3,
                           .verbose = true,
                           .name = "größe \"x\"\n",
                           .files = {"a", "b\\c"},
                           .seed = -5,
                           .epochs = 2.0,
                           .note = "",
                           .colour = Colour::kGreen};
  EXPECT_EQ(s, expected);
}

TEST(ConfigReader, LeavesWhatIsNotGiven) {
  Sample s;
  ConfigReader(table_of(s)).read("[run]\nname = 'x'\n", "a.toml");
  EXPECT_EQ(s, Sample{.name = "x"});
  ConfigReader(table_of(s)).read("", "a.toml");
  EXPECT_EQ(s, Sample{.name = "x"});
}

TEST(ConfigReader, NamesTheNearestKeyForAnUnknownOne) {
  EXPECT_EQ(read_error("[model]\n\nn_embed = 3\n"),
            "a.toml:3: unknown key model.n_embed; did you mean model.n_embd?");
  EXPECT_EQ(read_error("[model]\nverbose = true\n"),
            "a.toml:2: unknown key model.verbose; did you mean run.verbose?");
  EXPECT_EQ(read_error("[model]\nentirely_else = 3\n"),
            "a.toml:2: unknown key model.entirely_else; expected one of n_embd, head_size");
}

TEST(ConfigReader, NamesTheNearestSectionForAnUnknownOne) {
  EXPECT_EQ(read_error("\n[modle]\nn_embd = 3\n"),
            "a.toml:2: unknown section modle; did you mean model?");
  EXPECT_EQ(read_error("[optimizer]\n"),
            "a.toml:1: unknown section optimizer; expected one of model, run");
  EXPECT_EQ(read_error("n_embd = 3\n"),
            "a.toml:1: n_embd = 3 (an integer) stands in no section; expected it below a line such "
            "as [model]");
}

TEST(ConfigReader, SaysWhatWasFoundAndExpected) {
  EXPECT_EQ(read_error("[model]\nn_embd = 2.5\n"),
            "a.toml:2: model.n_embd = 2.5 (a float): expected an integer");
  EXPECT_EQ(read_error("[model]\nn_embd = '8'\n"),
            "a.toml:2: model.n_embd = \"8\" (a string): expected an integer");
  EXPECT_EQ(read_error("[model]\nhead_size = 0\n"),
            "a.toml:2: model.head_size = 0 (an integer): expected another integer, or the key left "
            "out");
  EXPECT_EQ(read_error("[run]\nrate = true\n"),
            "a.toml:2: run.rate = true (a boolean): expected a number");
  EXPECT_EQ(read_error("[run]\nverbose = 1\n"),
            "a.toml:2: run.verbose = 1 (an integer): expected true or false");
  EXPECT_EQ(read_error("[run]\nname = 2026-01-02\n"),
            "a.toml:2: run.name = 2026-01-02 (a date or time): expected a string");
  EXPECT_EQ(read_error("[run]\nnote = ['a']\n"), "a.toml:2: run.note = a list: expected a string");
  EXPECT_EQ(read_error("[run]\nfiles = ['a', 1]\n"),
            "a.toml:2: run.files = a list: expected a list of strings");
  EXPECT_EQ(read_error("[run]\nseed = {a = 1}\n"),
            "a.toml:2: run.seed = a table: expected an integer");
  EXPECT_EQ(read_error("[run]\nepochs = 'x'\n"),
            "a.toml:2: run.epochs = \"x\" (a string): expected a number");
  EXPECT_EQ(read_error("[run]\ncolour = 'blue'\n"),
            "a.toml:2: run.colour = \"blue\" (a string): expected \"red\" or \"green\"");
  EXPECT_EQ(read_error("[run]\ncolour = 1\n"),
            "a.toml:2: run.colour = 1 (an integer): expected \"red\" or \"green\"");
}

TEST(ConfigReader, NamesTheLineOfADuplicateKeyAndOfBrokenSyntax) {
  EXPECT_THAT(read_error("[model]\nn_embd = 3\nn_embd = 4\n"), StartsWith("a.toml:3: "));
  EXPECT_THAT(read_error("[model]\n[run]\n[model]\n"), StartsWith("a.toml:3: "));
  EXPECT_THAT(read_error("[model]\nn_embd = \n"), StartsWith("a.toml:2: "));
  EXPECT_THAT(read_error("[model]\nn_embd = 99999999999999999999\n"), StartsWith("a.toml:2: "));
  EXPECT_THAT(read_error("[run]\nname = \"\xff\"\n"), StartsWith("a.toml:2: "));
}

// Each part of a key is a table in a table, and toml++ goes through them one call inside another.
TEST(ConfigReader, RefusesAKeyOfVeryManyParts) {
  std::string key = "a";
  for (int part = 0; part < 200000; ++part) {
    key += part % 2 == 0 ? ".a" : " . \"a.b\"";
  }
  for (const std::string& text : {key + " = 1\n", "[" + key + "]\n", "x = {" + key + " = 1}\n"}) {
    EXPECT_THAT(read_error("\n" + text), AllOf(StartsWith("a.toml:2: "), HasSubstr("16 parts")));
  }
  // Numbers have points as well.
  std::string numbers = "1.5";
  for (int i = 0; i < 40; ++i) {
    numbers += ", 1.5";
  }
  EXPECT_THAT(read_error("[model]\nn_embd = [" + numbers + "]\n"), HasSubstr("a list"));
}

TEST(ConfigReader, QuotesOnlyTheEndsOfALongText) {
  const std::string text = read_error("[model]\nn_embd = \"" + std::string(1 << 20, 'x') + "\"\n");
  EXPECT_THAT(text, AllOf(StartsWith("a.toml:2: model.n_embd = \"xxx"), HasSubstr("an integer")));
  EXPECT_LT(text.size(), 3000u);
}

// toml++ 3.3 runs into undefined behaviour on these: an error of ours comes first.
TEST(ConfigReader, RefusesForeignCharactersOutsideOfQuotes) {
  EXPECT_EQ(read_error("[run]\nname = \u201cx\u201d\n"),
            "a.toml:2: \u201c stands outside of quotes; only \"strings\" and comments may hold it");
  EXPECT_THAT(read_error("[run]\n# \u00fc\n\u00fc = 1\n"), StartsWith("a.toml:3: \u00fc stands"));
  EXPECT_THAT(read_error("[run]\nseed = 1\u00fc\n"), StartsWith("a.toml:2: \u00fc stands"));
  EXPECT_THAT(read_error("[run]\nseed =\u00a01\n"), StartsWith("a.toml:2: \u00a0 stands"));
  EXPECT_THAT(read_error("[run]\nname = 'a'\u0183\n"), StartsWith("a.toml:2: \u0183 stands"));
  EXPECT_THAT(read_error("[run]\nname = \"a\\\"\u00fc\"\u0183\n"), StartsWith("a.toml:2: \u0183"));
  EXPECT_THAT(read_error("[run]\nname = \"\"\"\n \\\u00fc\"\"\"\n"), HasSubstr("triple quotes"));
  EXPECT_THAT(read_error("[run]\nname = '''a'''\n"), HasSubstr("a.toml:2: a string in triple"));
  EXPECT_EQ(read_error("[run]\nseed = 4\"\u0183\"\n"), "a.toml:2: \" stands inside of a word");
  // A number would go on up to the character behind each of these.
  for (const char* value : {"0['\ufefb'",
                            "0[\"\ufefb\"",
                            "0{'\ufefb'",
                            "0.'\ufefb'",
                            "0='\ufefb'",
                            "='\ufefb'",
                            "[1, ='\ufefb']",
                            "[1, 0['\ufefb']",
                            "{ a = 1, b = 0.'\ufefb' }"}) {
    EXPECT_THAT(read_error("[run]\nseed = " + std::string(value) + "\n"),
                testing::ContainsRegex("a.toml:2: . stands inside of a (word|value)"))
        << value;
  }
}

TEST(ConfigReader, TakesForeignCharactersInQuotesAndComments) {
  Sample s;
  ConfigReader(table_of(s))
      .read(
          "\xef\xbb\xbf# \u00fc \" '\n[run] # \u201c\nname = \"\u00fc'\\\\\" # \u0183\r\nnote = "
          "'\u00fc\"\\'\n",
          "a.toml");
  EXPECT_EQ(s, (Sample{.name = "\u00fc'\\", .note = "\u00fc\"\\"}));
}

TEST(ConfigReader, ReportsTheFirstErrorOfTheFile) {
  // By name, "model" and "a" would come first.
  EXPECT_THAT(read_error("[run]\nz = 1\na = 2\n[model]\nb = 1\n"), StartsWith("a.toml:2: "));
}

TEST(ConfigOption, TakesTomlValues) {
  EXPECT_EQ(with_option("model.n_embd=1_024").n_embd, 1024);
  EXPECT_EQ(with_option("run.rate=1e-3").rate, 1e-3);
  EXPECT_EQ(with_option("run.verbose=true").verbose, true);
  EXPECT_EQ(with_option("run.name=\"a b\"").name, "a b");
  EXPECT_THAT(with_option("run.files=['a', 'b=c']").files, testing::ElementsAre("a", "b=c"));
}

TEST(ConfigOption, TakesABareWordAsAString) {
  EXPECT_EQ(with_option("run.name=runs/a-1.2").name, "runs/a-1.2");
  EXPECT_EQ(with_option("run.name=a=b # c").name, "a=b # c");
  EXPECT_EQ(with_option("run.note=C:\\new").note, "C:\\new");
  EXPECT_EQ(with_option("run.colour=green").colour, Colour::kGreen);
}

TEST(ConfigOption, DoesNotMistakeAStringForSomethingElse) {
  EXPECT_EQ(with_option("run.name=2026-01-02").name, "2026-01-02");
  EXPECT_EQ(with_option("run.name=true").name, "true");
  EXPECT_EQ(with_option("run.note=12").note, "12");
  EXPECT_EQ(with_option("run.name=\u0183").name, "\u0183");
  EXPECT_EQ(with_option("run.name='\u0183'").name, "\u0183");
}

TEST(ConfigOption, NamesItselfInErrors) {
  EXPECT_EQ(option_error("model.n_embed=3"),
            "--set model.n_embed=3: unknown key model.n_embed; did you mean model.n_embd?");
  EXPECT_EQ(option_error("modle.n_embd=3"),
            "--set modle.n_embd=3: unknown section modle; did you mean model?");
  EXPECT_EQ(option_error("model.n_embd=wide"),
            "--set model.n_embd=wide: model.n_embd = \"wide\" (a string): expected an integer");
  EXPECT_EQ(
      option_error("model.n_embd=3\nrate = 4"),
      "--set model.n_embd=3\nrate = 4: model.n_embd = \"3\\u000Arate = 4\" (a string): expected "
      "an integer");
  for (const char* broken : {"n_embd=3", "model.n_embd", "model", "", "=", "n_embd=a.b"}) {
    EXPECT_THAT(option_error(broken), HasSubstr("expected section.key=value")) << broken;
  }
  EXPECT_THAT(option_error("run.name=\"a"), StartsWith("--set run.name=\"a: "));
  EXPECT_EQ(option_error("model.n_embd=\u0183"),
            "--set model.n_embd=\u0183: model.n_embd = \"\u0183\" (a string): expected an integer");
  EXPECT_THAT(option_error("run.files=[\u0183]"), HasSubstr("outside of quotes"));
  EXPECT_THAT(option_error("run.files=['a'"), StartsWith("--set run.files=['a': "));
  EXPECT_THAT(option_error("model.n_embd="), StartsWith("--set model.n_embd=: "));
  EXPECT_THAT(option_error("run.name=\xff"), StartsWith("--set run.name=\xff: "));
}

TEST(ConfigOption, ReplacesTheFilesChoice) {
  Sample s;
  ConfigReader reader(table_of(s));
  reader.read("[run]\ntotal_tokens = 1000\nseed = 1\n", "a.toml");
  reader.apply_option("run.total_steps=7");
  EXPECT_EQ(s, (Sample{.seed = 1, .total_steps = 7}));
}

TEST(ConfigOption, DoesNotReplaceAnotherOptionsChoice) {
  Sample s;
  ConfigReader reader(table_of(s));
  reader.apply_option("run.total_tokens=1000");
  reader.apply_option("run.total_steps=7");
  EXPECT_EQ(s, (Sample{.total_steps = 7, .total_tokens = 1000}));
}

TEST(ConfigPlace, IsWhereTheKeyWasSet) {
  Sample s;
  ConfigReader reader(table_of(s));
  EXPECT_EQ(reader.with_place("model.n_embd = 3: bad"), "model.n_embd = 3: bad");
  reader.read("[model]\n\nn_embd = 3\nhead_size = 2\n", "configs/a.toml");
  EXPECT_EQ(reader.with_place("model.n_embd = 3: bad"), "configs/a.toml:3: model.n_embd = 3: bad");
  EXPECT_EQ(reader.with_place("run.name is not given"), "configs/a.toml: run.name is not given");
  reader.apply_option("model.n_embd=4");
  EXPECT_EQ(reader.with_place("model.n_embd = 4: bad"),
            "--set model.n_embd=4: model.n_embd = 4: bad");
  EXPECT_EQ(reader.with_place("model.head_size: bad"), "configs/a.toml:4: model.head_size: bad");
}

TEST(ConfigText, IsStable) {
  Sample s = {.n_embd = 3, .files = {"a", "b"}, .seed = 4};
  EXPECT_EQ(to_toml(table_of(s)),
            "[model]\n"
            "n_embd = 3                          # width\n"
            "# head_size is not given            # of a head\n"
            "\n"
            "[run]\n"
            "rate = 0.1                          # a number\n"
            "verbose = false                     # yes or no\n"
            "name = \"none\"                       # a name\n"
            "files = [\"a\", \"b\"]                  # paths\n"
            "seed = 4                            # any\n"
            "# epochs is not given               # any\n"
            "# note is not given                 # any\n"
            "colour = \"red\"                      # red or green\n"
            "# total_steps is not given          # steps\n"
            "# total_tokens is not given         # tokens\n");
}

TEST(ConfigText, ReadsBackEqual) {
  constexpr auto kMost = std::numeric_limits<int64_t>::max();
  std::string every_byte_of_ascii;
  for (char c = 0; c < 127; ++c) {
    every_byte_of_ascii += c;
  }
  every_byte_of_ascii += '\x7f';
  for (const double rate : {0.1,
                            1.0 / 3,
                            1e-8,
                            -0.0,
                            3.0,
                            1e22,
                            5e-324,
                            std::numeric_limits<double>::max(),
                            std::numeric_limits<double>::infinity()}) {
    Sample s = {.n_embd = std::numeric_limits<int64_t>::min(),
                .head_size = kMost,
                .rate = rate,
                .verbose = true,
                .name = every_byte_of_ascii,
                .files = {"größe", "\\\"'#\n", ""},
                .seed = kMost,
                .epochs = -rate,
                .note = "",
                .colour = Colour::kGreen};
    Sample back;
    ConfigReader(table_of(back)).read(to_toml(table_of(s)), "printed");
    EXPECT_EQ(back, s) << to_toml(table_of(s));
    EXPECT_EQ(std::signbit(back.rate), std::signbit(s.rate));
  }
}

TEST(ConfigText, WritesDoublesShortest) {
  EXPECT_EQ(to_config_text(6e-4), "6e-04");
  EXPECT_EQ(to_config_text(0.99), "0.99");
  EXPECT_EQ(to_config_text(1e-8), "1e-08");
  EXPECT_EQ(to_config_text(1.0), "1.0");
  EXPECT_EQ(to_config_text(1e22), "1e+22");
  EXPECT_EQ(to_config_text(std::nan("")), "nan");
}

}  // namespace
}  // namespace rwkv
