// Configuration files: TOML bound strictly to the fields of structs. One table of fields reads a
// file, applies "section.key=value" options, prints the result and names the place of every error.
// The only code that knows TOML.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace rwkv {

// A number for which 0 means "not given": a file must leave the key out instead of writing 0.
struct AbsentIfZero {
  int64_t* value = nullptr;
};

// An enum, by the names of its values. Made by by_name().
struct EnumTarget {
  std::vector<std::string> names;
  std::function<size_t()> get;      // index in names
  std::function<void(size_t)> set;  // by index in names
};

template <typename Enum>
EnumTarget by_name(Enum* value, std::vector<std::pair<std::string, Enum>> choices) {
  EnumTarget target;
  for (const auto& [name, choice] : choices) {
    target.names.push_back(name);
  }
  target.get = [value, choices] {
    size_t i = 0;
    while (i + 1 < choices.size() && choices[i].second != *value) {
      ++i;
    }
    return i;
  };
  target.set = [value, choices](size_t i) { *value = choices.at(i).second; };
  return target;
}

// Where a field's value lives. An empty std::optional is a key left out; every other field keeps
// what the variable holds if the key is left out. A double also takes a TOML integer.
using ConfigTarget = std::variant<int64_t*,
                                  AbsentIfZero,
                                  double*,
                                  bool*,
                                  std::string*,
                                  std::vector<std::string>*,
                                  std::optional<int64_t>*,
                                  std::optional<double>*,
                                  std::optional<std::string>*,
                                  EnumTarget>;

// Whether a run can be resumed with another value than the one it was started with. For the owner
// of the table; nothing here uses it.
enum class OnResume { kMustMatch, kMayDiffer };

struct ConfigField {
  std::string key;
  ConfigTarget target;
  std::string comment;  // one line: what it is, unit, allowed range
  OnResume on_resume = OnResume::kMustMatch;
  // Fields of a section with the same choice exclude each other: an option that sets one clears
  // what a file said of the others. (That a file itself gives one alone is for validate() to
  // check.)
  std::string choice = "";
};

struct ConfigSection {
  std::string name;
  std::vector<ConfigField> fields;
};

// The value as TOML, or nothing if it is absent.
std::optional<std::string> to_toml_value(const ConfigTarget& target);

// All sections as TOML, in table order, each key with its comment; an absent one as a comment line
// alone. The same values give the same bytes, and reading them gives the same values.
std::string to_toml(const std::vector<ConfigSection>& sections);

// Reads into the variables that the table points at, which must outlive it. On an exception they
// may hold a part of what was read.
class ConfigReader {
 public:
  explicit ConfigReader(std::vector<ConfigSection> sections);

  // Reads a whole document; `name` (a path) is what errors call it. Throws std::invalid_argument
  // "name:line: ..." for a syntax error, a duplicate key, an unknown section or key (with the
  // nearest known one), or a value of the wrong type. Of several, the first in the file.
  void read(std::string_view text, const std::string& name);

  // Applies one command-line option, "section.key=value". The value is TOML; what is no TOML value
  // but a bare word is a string, and a field that is a string takes any text not in quotes as it
  // stands ("train.run_dir=2026-01-01" is not a date). Throws std::invalid_argument
  // "--set section.key=value: ...".
  void apply_option(const std::string& option);

  // Puts the place where the key was set before an error that starts with a key, as those of
  // validate() do: "model.n_embd = -3: must be ..." becomes "configs/a.toml:14: model.n_embd =
  // ...". A key that was not set gets the name of the file alone, if one was read.
  std::string with_place(std::string_view error) const;

 private:
  const ConfigSection* find_section(std::string_view name) const;
  void require_section(const std::string& place, std::string_view name) const;
  const ConfigField& require_field(const std::string& place,
                                   const ConfigSection& section,
                                   std::string_view key) const;

  std::vector<ConfigSection> sections_;
  std::string file_name_;
  std::map<std::string, std::string, std::less<>> places_;  // by "section.key"
};

// Every value of a document with its key ("section.key") and as TOML, in the file's order: to show
// a file of another release of the program, whose keys are not ours. Throws as ConfigReader::read
// does for a text that is no TOML.
std::vector<std::pair<std::string, std::string>> list_values(std::string_view text,
                                                             const std::string& name);

}  // namespace rwkv
