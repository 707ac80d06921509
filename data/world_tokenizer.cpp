#include "data/world_tokenizer.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <stdexcept>

#include "data/atomic_file.h"
#include "data/content_hash.h"
#include "data/utf8.h"

namespace rwkv {
namespace {

constexpr int64_t kVocabSizeMultiple = 64;
// The World vocabulary has 1.1 MB.
constexpr uint64_t kMaxFileBytes = 64 << 20;
// Far above any vocabulary, far below what would make a table of ids a burden.
constexpr int32_t kMaxId = (1 << 24) - 1;

// One line of the vocabulary file, read from left to right.
class LineParser {
 public:
  LineParser(const std::string& path, size_t line_number, std::string_view line)
      : path_(path), line_number_(line_number), line_(line) {}

  struct Token {
    int32_t id = 0;
    std::string bytes;
  };
  Token parse() const {
    const size_t first_space = line_.find(' ');
    const size_t last_space = line_.rfind(' ');
    if (first_space == std::string_view::npos || first_space == last_space) {
      fail("found \"" + std::string(line_.substr(0, 80)) + "\", expected `ID LITERAL LENGTH`");
    }
    Token token;
    token.id = number(line_.substr(0, first_space), "the id", 1, kMaxId);
    const int32_t length =
        number(line_.substr(last_space + 1), "the length", 1, std::numeric_limits<int32_t>::max());
    token.bytes = literal(line_.substr(first_space + 1, last_space - first_space - 1));
    if (static_cast<int64_t>(token.bytes.size()) != length) {
      fail("token " + std::to_string(token.id) + " has " + std::to_string(token.bytes.size()) +
           " bytes, but the line says " + std::to_string(length) + "; was the file edited?");
    }
    return token;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ":" + std::to_string(line_number_) + ": " + what);
  }

 private:
  int32_t number(std::string_view digits, const char* name, int32_t low, int32_t high) const {
    int32_t value = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size() || value < low ||
        value > high) {
      fail(std::string(name) + " is \"" + std::string(digits.substr(0, 40)) +
           "\", expected a number " + std::to_string(low) + " .. " + std::to_string(high));
    }
    return value;
  }

  std::string literal(std::string_view text) const {
    const bool is_bytes = text.starts_with('b');
    std::string_view quoted = text.substr(is_bytes ? 1 : 0);
    if (quoted.size() < 2 || (quoted.front() != '\'' && quoted.front() != '"') ||
        quoted.back() != quoted.front()) {
      fail("found " + std::string(text.substr(0, 80)) + ", expected '...', \"...\" or b'...'");
    }
    const char quote = quoted.front();
    quoted = quoted.substr(1, quoted.size() - 2);
    std::string bytes;
    for (size_t i = 0; i < quoted.size();) {
      if (quoted[i] == quote) {
        fail(std::string("an unescaped ") + quote + " inside the literal; write \\" + quote);
      }
      if (quoted[i] == '\\') {
        i += escape(quoted.substr(i), is_bytes, bytes);
        continue;
      }
      const size_t length = utf8_char_length(quoted.substr(i));
      if (length == 0 || (is_bytes && length > 1)) {
        fail(is_bytes ? "a bytes literal holds a character that is not ASCII; write \\xHH"
                      : "the literal is not valid UTF-8; is the file in another encoding?");
      }
      bytes += quoted.substr(i, length);
      i += length;
    }
    return bytes;
  }

  // Appends what an escape at the start of `text` stands for and returns its length.
  size_t escape(std::string_view text, bool is_bytes, std::string& bytes) const {
    const char kind = text.size() > 1 ? text[1] : '\0';
    switch (kind) {
      case 'n':
        bytes += '\n';
        return 2;
      case 'r':
        bytes += '\r';
        return 2;
      case 't':
        bytes += '\t';
        return 2;
      case '\\':
      case '\'':
      case '"':
        bytes += kind;
        return 2;
      default:
        break;
    }
    const size_t digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
    if (digits == 0 || (is_bytes && kind != 'x')) {
      fail("unknown escape " + std::string(text.substr(0, 2)) + "; expected " +
           (is_bytes ? "\\xHH" : "\\xHH \\uHHHH \\UHHHHHHHH") + " \\n \\r \\t \\\\ \\' or \\\"");
    }
    const std::string_view hex = text.substr(2, digits);
    uint32_t code = 0;
    const auto [end, error] = std::from_chars(hex.data(), hex.data() + hex.size(), code, 16);
    if (hex.size() != digits || error != std::errc() || end != hex.data() + hex.size()) {
      fail("the escape " + std::string(text.substr(0, 2 + digits)) + " needs " +
           std::to_string(digits) + " hexadecimal digits");
    }
    if (is_bytes) {
      bytes += static_cast<char>(code);
    } else if (!append_utf8(code, bytes)) {
      fail("the escape " + std::string(text.substr(0, 2 + digits)) + " is no Unicode character");
    }
    return 2 + digits;
  }

  const std::string& path_;
  size_t line_number_;
  std::string_view line_;
};

struct ListedToken {
  LineParser::Token token;
  size_t line_number = 0;
};

std::vector<ListedToken> parse_lines(const std::string& path, std::string_view content) {
  std::vector<ListedToken> tokens;
  size_t line_number = 0;
  while (!content.empty()) {
    ++line_number;
    const size_t end = std::min(content.find('\n'), content.size());
    std::string_view line = content.substr(0, end);
    content.remove_prefix(std::min(end + 1, content.size()));
    if (line.ends_with('\r')) {
      line.remove_suffix(1);
    }
    tokens.push_back({LineParser(path, line_number, line).parse(), line_number});
  }
  return tokens;
}

// Throws if two tokens share what `less` orders by.
template <typename Less>
void refuse_repeats(const std::string& path,
                    std::vector<ListedToken>& tokens,
                    const char* what,
                    Less less) {
  std::sort(tokens.begin(), tokens.end(), [&](const ListedToken& a, const ListedToken& b) {
    return less(a, b) || (!less(b, a) && a.line_number < b.line_number);
  });
  const auto repeat = std::adjacent_find(
      tokens.begin(), tokens.end(), [&](const ListedToken& a, const ListedToken& b) {
        return !less(a, b);
      });
  if (repeat != tokens.end()) {
    LineParser(path, (repeat + 1)->line_number, "")
        .fail("token " + std::to_string((repeat + 1)->token.id) + " repeats the " + what +
              " of line " + std::to_string(repeat->line_number));
  }
}

}  // namespace

WorldTokenizer::WorldTokenizer(const std::string& vocabulary_path) {
  const std::string content = read_text_file(vocabulary_path, kMaxFileBytes);
  parse(vocabulary_path, content);
  identity_ = "world:" + content_hash(std::as_bytes(std::span(content)));
}

void WorldTokenizer::parse(const std::string& path, std::string_view content) {
  std::vector<ListedToken> tokens = parse_lines(path, content);
  refuse_repeats(path, tokens, "bytes", [](const ListedToken& a, const ListedToken& b) {
    return a.token.bytes < b.token.bytes;
  });
  refuse_repeats(path, tokens, "id", [](const ListedToken& a, const ListedToken& b) {
    return a.token.id < b.token.id;
  });
  const int32_t largest_id = tokens.empty() ? 0 : tokens.back().token.id;
  vocab_size_ = (largest_id + kVocabSizeMultiple) / kVocabSizeMultiple * kVocabSizeMultiple;

  std::vector<ByteTrie::Entry> entries;
  std::vector<bool> has_byte(256, false);
  starts_.reserve(static_cast<size_t>(largest_id) + 2);
  starts_.push_back(0);
  for (const auto& [token, line_number] : tokens) {
    // Ids that the file leaves out get empty tokens.
    starts_.resize(static_cast<size_t>(token.id) + 1, static_cast<uint32_t>(pool_.size()));
    pool_ += token.bytes;
    entries.push_back({token.bytes, token.id});
    if (token.bytes.size() == 1) {
      has_byte[static_cast<unsigned char>(token.bytes[0])] = true;
    }
  }
  starts_.push_back(static_cast<uint32_t>(pool_.size()));
  const auto missing = std::find(has_byte.begin(), has_byte.end(), false);
  if (missing != has_byte.end()) {
    throw std::runtime_error(path + ": of the 256 single bytes, no token is the byte " +
                             std::to_string(missing - has_byte.begin()) +
                             ", so that some texts could not be encoded; is the file cut short?");
  }
  trie_ = ByteTrie(std::move(entries));
}

size_t WorldTokenizer::encode_part(std::string_view text,
                                   TextEnd end,
                                   std::vector<int32_t>& ids) const {
  const char* const begin = text.data();
  while (!text.empty()) {
    const ByteTrie::Match match = trie_.longest(text);
    if (match.open && end == TextEnd::kMore) {
      break;
    }
    ids.push_back(match.value);
    text.remove_prefix(match.length);
  }
  return static_cast<size_t>(text.data() - begin);
}

void WorldTokenizer::decode(std::span<const int32_t> ids, std::string& text) const {
  for (const int32_t id : ids) {
    const auto index = static_cast<size_t>(id);
    const bool in_range = id >= 0 && index + 1 < starts_.size();
    if (!in_range || (id != 0 && starts_[index] == starts_[index + 1])) {
      throw std::invalid_argument("token id " + std::to_string(id) +
                                  " is not in the World vocabulary; its tokens are 0 .. " +
                                  std::to_string(starts_.size() - 2));
    }
    text.append(pool_, starts_[index], starts_[index + 1] - starts_[index]);
  }
}

}  // namespace rwkv
