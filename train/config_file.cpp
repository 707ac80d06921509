#include "train/config_file.h"

#include <algorithm>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include <toml++/toml.h>

#include "data/utf8.h"
#include "train/config_value.h"

namespace rwkv {
namespace {

template <typename... Ts>
struct Overloaded : Ts... {
  using Ts::operator()...;
};
template <typename... Ts>
Overloaded(Ts...) -> Overloaded<Ts...>;

// Wide enough that the comments of most lines start in one column.
constexpr size_t kCommentColumn = 36;

// Texts quote keys and values, which may be as long as the file: of a long one, both ends.
[[noreturn]] void fail(const std::string& place, const std::string& what) {
  constexpr size_t kShownBytes = 1000;
  const bool is_long = what.size() > 2 * kShownBytes;
  throw std::invalid_argument(
      place + ": " +
      (is_long ? what.substr(0, kShownBytes) + " [...] " + what.substr(what.size() - kShownBytes)
               : what));
}

std::string join(const std::vector<std::string>& items, std::string_view last_separator) {
  std::string text;
  for (size_t i = 0; i < items.size(); ++i) {
    text += i == 0 ? "" : i + 1 == items.size() ? last_separator : std::string_view(", ");
    text += items[i];
  }
  return text;
}

// Levenshtein's distance: insertions, deletions and replacements of one character.
size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i + 1;
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

// "; did you mean x?", or all candidates if none is near enough to be a slip of the hand.
std::string suggestion(std::string_view found,
                       const std::vector<std::string>& candidates,
                       const std::string& prefix) {
  const auto nearest = std::min_element(
      candidates.begin(), candidates.end(), [&](const std::string& a, const std::string& b) {
        return edit_distance(found, a) < edit_distance(found, b);
      });
  if (edit_distance(found, *nearest) <= std::max<size_t>(2, found.size() / 3)) {
    return "; did you mean " + prefix + *nearest + "?";
  }
  return "; expected one of " + join(candidates, ", ");
}

std::string found_text(const toml::node& node) {
  const auto article = [&]() -> std::string {
    switch (node.type()) {
      case toml::node_type::string:
        return "a string";
      case toml::node_type::integer:
        return "an integer";
      case toml::node_type::floating_point:
        return "a float";
      case toml::node_type::boolean:
        return "a boolean";
      case toml::node_type::array:
        return "a list";
      case toml::node_type::table:
        return "a table";
      default:
        return "a date or time";
    }
  }();
  std::ostringstream text;
  node.visit([&](const auto& value) {
    if constexpr (toml::is_string<decltype(value)>) {
      text << to_config_text(std::string_view(value.get())) << " (" << article << ")";
    } else if constexpr (toml::is_value<decltype(value)>) {
      text << toml::toml_formatter(value) << " (" << article << ")";
    } else {
      text << article;
    }
  });
  return text.str();
}

// One reading function a type; nothing if the node is of another.
std::optional<int64_t> read_integer(const toml::node& node) {
  return node.value_exact<int64_t>();
}

std::optional<double> read_double(const toml::node& node) {
  if (const auto integer = node.value_exact<int64_t>()) {
    return static_cast<double>(*integer);
  }
  return node.value_exact<double>();
}

std::optional<std::vector<std::string>> read_strings(const toml::node& node) {
  if (!node.is_array()) {
    return std::nullopt;
  }
  std::vector<std::string> strings;
  for (const toml::node& item : *node.as_array()) {
    if (!item.is_string()) {
      return std::nullopt;
    }
    strings.push_back(item.as_string()->get());
  }
  return strings;
}

// Stores a value if there is one; says what was expected otherwise.
template <typename Target, typename Value>
std::string store(Target* target, const std::optional<Value>& value, const char* expected) {
  if (!value) {
    return expected;
  }
  *target = *value;
  return "";
}

// Empty if the node was of the field's type and has been stored; else what was expected.
std::string assign(const ConfigTarget& target, const toml::node& node) {
  constexpr const char* kInteger = "an integer";
  constexpr const char* kNumber = "a number";
  constexpr const char* kString = "a string";
  const auto read_string = [&] { return node.value_exact<std::string>(); };
  return std::visit(
      Overloaded{
          [&](int64_t* value) { return store(value, read_integer(node), kInteger); },
          [&](std::optional<int64_t>* value) { return store(value, read_integer(node), kInteger); },
          [&](AbsentIfZero field) -> std::string {
            const auto value = read_integer(node);
            if (value == 0) {
              return "another integer, or the key left out";
            }
            return store(field.value, value, kInteger);
          },
          [&](double* value) { return store(value, read_double(node), kNumber); },
          [&](std::optional<double>* value) { return store(value, read_double(node), kNumber); },
          [&](bool* value) { return store(value, node.value_exact<bool>(), "true or false"); },
          [&](std::string* value) { return store(value, read_string(), kString); },
          [&](std::optional<std::string>* value) { return store(value, read_string(), kString); },
          [&](std::vector<std::string>* value) {
            return store(value, read_strings(node), "a list of strings");
          },
          [&](const EnumTarget& choice) -> std::string {
            const auto name = read_string();
            const auto found = std::find(choice.names.begin(), choice.names.end(), name);
            if (found == choice.names.end()) {
              std::vector<std::string> quoted;
              for (const std::string& known : choice.names) {
                quoted.push_back(to_config_text(std::string_view(known)));
              }
              return join(quoted, " or ");
            }
            choice.set(static_cast<size_t>(found - choice.names.begin()));
            return "";
          },
      },
      target);
}

void assign_or_fail(const std::string& place,
                    const std::string& full_key,
                    const ConfigField& field,
                    const toml::node& node) {
  const std::string expected = assign(field.target, node);
  if (!expected.empty()) {
    fail(place, full_key + " = " + found_text(node) + ": expected " + expected);
  }
}

// Empties the fields that `field` excludes, and forgets where they were set.
void clear_choice(const ConfigField& field) {
  std::visit(
      [](const auto& target) {
        using Target = std::decay_t<decltype(target)>;
        if constexpr (std::is_same_v<Target, std::optional<int64_t>*> ||
                      std::is_same_v<Target, std::optional<double>*> ||
                      std::is_same_v<Target, std::optional<std::string>*>) {
          target->reset();
        }
      },
      field.target);
}

// Entries of a table in the order of the file: toml++ keeps them by name, and of several errors the
// first in the file is the one to report.
std::vector<std::pair<const toml::key*, const toml::node*>> in_file_order(
    const toml::table& table) {
  std::vector<std::pair<const toml::key*, const toml::node*>> entries;
  for (const auto& [key, node] : table) {
    entries.emplace_back(&key, &node);
  }
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    return a.first->source().begin < b.first->source().begin;
  });
  return entries;
}

std::string place_of(const std::string& name, const toml::source_region& source) {
  return name + ":" + std::to_string(source.begin.line);
}

bool takes_plain_text(const ConfigTarget& target) {
  return std::holds_alternative<std::string*>(target) ||
         std::holds_alternative<std::optional<std::string>*>(target) ||
         std::holds_alternative<EnumTarget>(target);
}

struct TextError {
  int64_t line;
  std::string what;
};

// Finds what toml++ 3.3 must not be given, because its search for white space runs into undefined
// behaviour on some characters above U+007F: such a character outside of quotes and comments, which
// TOML has no use for (a quotation mark of a word processor is the usual one), or a string in
// triple quotes, in which that search runs too; a quote, bracket or "=" inside of a value, which it
// would take for a part of a number that goes on up to the next white space; and a key of so many
// parts that the tables it nests would take the whole stack. Stops where toml++ will stop with an
// error of its own.
std::optional<TextError> find_unreadable(std::string_view text) {
  if (text.starts_with("\xef\xbb\xbf")) {
    text.remove_prefix(3);  // a byte order mark
  }
  constexpr int kMaxDots = 16;
  int64_t line = 1;
  char inside = 0;        // the quote of a string, '#' of a comment, or 0
  int dots = 0;           // of the key, or number, that goes on here
  std::string open;       // brackets of values
  bool in_value = false;  // not in a key
  // Whether what is at `i` begins a key or a value, and does not stand inside of one.
  const auto begins = [&](size_t i, std::string_view separators) {
    return i == 0 || separators.find(text[i - 1]) != text.npos;
  };
  constexpr std::string_view kBeforeKey = " \t\n,.[{";
  constexpr std::string_view kBeforeValue = " \t\n,=[";
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') {
      if (inside == '"' || inside == '\'') {
        return std::nullopt;
      }
      ++line;
      inside = 0;
      dots = 0;
      in_value = !open.empty();
    } else if (inside != 0) {
      if (inside == '"' && c == '\\' && i + 1 < text.size() && text[i + 1] != '\n') {
        ++i;
      } else if (inside != '#' && c == inside) {
        inside = 0;
      }
    } else if (c == '"' || c == '\'') {
      if (text.substr(i, 3) == std::string(3, c)) {
        return TextError{line, "a string in triple quotes; write it in single ones, on one line"};
      }
      if (!begins(i, in_value ? kBeforeValue : kBeforeKey)) {
        return TextError{line, std::string(1, c) + " stands inside of a word"};
      }
      inside = c;
    } else if (c == '.' && ++dots > kMaxDots) {
      return TextError{line,
                       "a key of more than " + std::to_string(kMaxDots) +
                           " parts; keys here have two, as in train.seed"};
    } else if (std::string_view("=,[]{}").find(c) != text.npos) {
      dots = 0;
      if (in_value && (c == '=' || ((c == '[' || c == '{') && !begins(i, kBeforeValue)))) {
        return TextError{line, std::string(1, c) + " stands inside of a value"};
      }
      if (in_value && (c == '[' || c == '{')) {
        open += c;
      } else if (!open.empty() && c == (open.back() == '[' ? ']' : '}')) {
        open.pop_back();
      }
      // A key comes at the start of a line and, in a table, after its brace and its commas.
      in_value = c == '=' || c == ']' || c == '}' || !open.empty();
      if (!open.empty() && open.back() == '{' && (c == '{' || c == ',')) {
        in_value = false;
      }
    } else if (c == '#') {
      inside = c;
    } else if (static_cast<unsigned char>(c) > 0x7f) {
      const size_t length = utf8_char_length(text.substr(i));
      if (length == 0) {
        return TextError{line, "a byte that is not UTF-8; save the text as UTF-8"};
      }
      return TextError{line,
                       std::string(text.substr(i, length)) +
                           " stands outside of quotes; only \"strings\" and comments may hold it"};
    }
  }
  return std::nullopt;
}

// The table { value = <text> } of an option's value. A bare word, and anything unquoted for a field
// that is a string, is read as if it stood in quotes; that also refuses text that is not UTF-8,
// which no TOML file could hold.
toml::table parse_option_value(const std::string& place,
                               const ConfigField& field,
                               std::string_view text) {
  const bool marked = !text.empty() && std::string_view("\"'[{").find(text[0]) != text.npos;
  const auto parse = [](std::string_view value) {
    return toml::parse("value = " + std::string(value));
  };
  const auto unreadable = find_unreadable(text);
  if (unreadable && marked) {
    fail(place, unreadable->what);
  }
  try {
    if (!marked && (unreadable || takes_plain_text(field.target))) {
      return parse(to_config_text(text));
    }
    try {
      toml::table table = parse(text);
      if (table.size() == 1) {
        return table;
      }
    } catch (const toml::parse_error&) {
      if (marked || text.empty()) {
        throw;
      }
    }
    return parse(to_config_text(text));
  } catch (const toml::parse_error& error) {
    fail(place, std::string(error.description()));
  }
}

toml::table parse_document(std::string_view text, const std::string& name) {
  if (const auto unreadable = find_unreadable(text)) {
    fail(name + ":" + std::to_string(unreadable->line), unreadable->what);
  }
  try {
    return toml::parse(text, name);
  } catch (const toml::parse_error& error) {
    fail(place_of(name, error.source()), std::string(error.description()));
  }
}

}  // namespace

std::optional<std::string> to_toml_value(const ConfigTarget& target) {
  using Text = std::optional<std::string>;
  const auto quoted = [](const std::string& text) {
    return to_config_text(std::string_view(text));
  };
  return std::visit(
      Overloaded{
          [](const int64_t* value) -> Text { return to_config_text(*value); },
          [](AbsentIfZero field) -> Text {
            return *field.value == 0 ? Text() : to_config_text(*field.value);
          },
          [](const double* value) -> Text { return to_config_text(*value); },
          [](const bool* value) -> Text { return *value ? "true" : "false"; },
          [&](const std::string* value) -> Text { return quoted(*value); },
          [&](const std::vector<std::string>* value) -> Text {
            std::vector<std::string> items(value->size());
            std::transform(value->begin(), value->end(), items.begin(), quoted);
            return "[" + join(items, ", ") + "]";
          },
          [](const std::optional<int64_t>* value) -> Text {
            return *value ? to_config_text(**value) : Text();
          },
          [](const std::optional<double>* value) -> Text {
            return *value ? to_config_text(**value) : Text();
          },
          [&](const std::optional<std::string>* value) -> Text {
            return *value ? quoted(**value) : Text();
          },
          [&](const EnumTarget& choice) -> Text { return quoted(choice.names.at(choice.get())); },
      },
      target);
}

std::string to_toml(const std::vector<ConfigSection>& sections) {
  std::string text;
  for (const ConfigSection& section : sections) {
    text += (text.empty() ? "[" : "\n[") + section.name + "]\n";
    for (const ConfigField& field : section.fields) {
      const auto value = to_toml_value(field.target);
      std::string line = value ? field.key + " = " + *value : "# " + field.key + " is not given";
      line.append(line.size() < kCommentColumn ? kCommentColumn - line.size() : 1, ' ');
      text += line + "# " + field.comment + "\n";
    }
  }
  return text;
}

ConfigReader::ConfigReader(std::vector<ConfigSection> sections) : sections_(std::move(sections)) {}

const ConfigSection* ConfigReader::find_section(std::string_view name) const {
  const auto found = std::find_if(
      sections_.begin(), sections_.end(), [&](const auto& s) { return s.name == name; });
  return found == sections_.end() ? nullptr : &*found;
}

void ConfigReader::require_section(const std::string& place, std::string_view name) const {
  if (find_section(name) != nullptr) {
    return;
  }
  std::vector<std::string> names;
  for (const ConfigSection& section : sections_) {
    names.push_back(section.name);
  }
  fail(place, "unknown section " + std::string(name) + suggestion(name, names, ""));
}

const ConfigField& ConfigReader::require_field(const std::string& place,
                                               const ConfigSection& section,
                                               std::string_view key) const {
  std::vector<std::string> keys;
  for (const ConfigField& field : section.fields) {
    if (field.key == key) {
      return field;
    }
    keys.push_back(field.key);
  }
  const std::string unknown = "unknown key " + section.name + "." + std::string(key);
  // The right key in the wrong section is the likelier slip than a misspelling.
  for (const ConfigSection& other : sections_) {
    for (const ConfigField& field : other.fields) {
      if (field.key == key) {
        fail(place, unknown + "; did you mean " + other.name + "." + field.key + "?");
      }
    }
  }
  fail(place, unknown + suggestion(key, keys, section.name + "."));
}

void ConfigReader::read(std::string_view text, const std::string& name) {
  file_name_ = name;
  const toml::table document = parse_document(text, name);
  for (const auto& [section_key, section_node] : in_file_order(document)) {
    const std::string section_place = place_of(name, section_key->source());
    const std::string section_name(section_key->str());
    if (!section_node->is_table()) {
      fail(section_place,
           section_name + " = " + found_text(*section_node) +
               " stands in no section; expected it below a line such as [" +
               sections_.front().name + "]");
    }
    require_section(section_place, section_name);
    const ConfigSection& section = *find_section(section_name);
    for (const auto& [key, node] : in_file_order(*section_node->as_table())) {
      const std::string place = place_of(name, key->source());
      const ConfigField& field = require_field(place, section, key->str());
      const std::string full_key = section.name + "." + field.key;
      assign_or_fail(place, full_key, field, *node);
      places_[full_key] = place;
    }
  }
}

void ConfigReader::apply_option(const std::string& option) {
  const std::string place = "--set " + option;
  const size_t equals = option.find('=');
  const size_t dot = option.find('.');
  if (equals == option.npos || dot >= equals) {
    fail(place, "expected section.key=value, such as --set train.seed=1");
  }
  const std::string section_name = option.substr(0, dot);
  require_section(place, section_name);
  const ConfigSection& section = *find_section(section_name);
  const ConfigField& field =
      require_field(place, section, option.substr(dot + 1, equals - dot - 1));
  const std::string full_key = section.name + "." + field.key;
  const toml::table value = parse_option_value(place, field, option.substr(equals + 1));
  assign_or_fail(place, full_key, field, *value.get("value"));
  for (const ConfigField& other : section.fields) {
    const auto set_at = places_.find(section.name + "." + other.key);
    if (!field.choice.empty() && other.choice == field.choice && other.key != field.key &&
        set_at != places_.end() && !set_at->second.starts_with("--set ")) {
      clear_choice(other);
      places_.erase(set_at);
    }
  }
  places_[full_key] = place;
}

std::string ConfigReader::with_place(std::string_view error) const {
  const std::string_view key = error.substr(0, error.find_first_of(" ,:;"));
  const auto found = places_.find(key);
  const std::string& place = found == places_.end() ? file_name_ : found->second;
  return place.empty() ? std::string(error) : place + ": " + std::string(error);
}

std::vector<std::pair<std::string, std::string>> list_values(std::string_view text,
                                                             const std::string& name) {
  const toml::table document = parse_document(text, name);
  std::vector<std::pair<std::string, std::string>> values;
  const auto add = [&](const std::string& key, const toml::node& node) {
    if (const auto real = node.value_exact<double>()) {
      // As to_toml writes it: TOML++ shows more digits than it takes.
      double copy = *real;
      values.emplace_back(key, *to_toml_value(&copy));
      return;
    }
    if (auto string = node.value_exact<std::string>()) {
      values.emplace_back(key, *to_toml_value(&*string));
      return;
    }
    std::ostringstream value;
    node.visit([&](const auto& any) { value << toml::toml_formatter(any); });
    values.emplace_back(key, value.str());
  };
  for (const auto& [section, node] : in_file_order(document)) {
    if (!node->is_table()) {
      add(std::string(section->str()), *node);
      continue;
    }
    for (const auto& [key, value] : in_file_order(*node->as_table())) {
      add(std::string(section->str()) + "." + std::string(key->str()), *value);
    }
  }
  return values;
}

}  // namespace rwkv
