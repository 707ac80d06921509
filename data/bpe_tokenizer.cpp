#include "data/bpe_tokenizer.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "data/atomic_file.h"
#include "data/bpe_file.h"
#include "data/bpe_merges.h"
#include "data/byte_trie.h"
#include "data/content_hash.h"
#include "data/nfc.h"
#include "data/utf8.h"

namespace rwkv {
namespace {

// 20B_tokenizer.json has 2.5 MB, the largest of its kind 12 MB; its JSON takes up to 30 times that.
constexpr uint64_t kMaxFileBytes = 32 << 20;

// GPT-2's rule. White space is written out, for PCRE2's \s also takes U+180E, which Unicode 6.3
// removed from White_Space. Some alternative matches at every character.
constexpr const char* kSplitPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{Z}\x09-\x0D\x{85}\p{L}\p{N}]+)"
    R"(|[\p{Z}\x09-\x0D\x{85}]+(?![^\p{Z}\x09-\x0D\x{85}])|[\p{Z}\x09-\x0D\x{85}]+)";

bool is_white_space(uint32_t code) {
  return (code >= 0x09 && code <= 0x0D) || code == 0x20 || code == 0x85 || code == 0xA0 ||
         code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 || code == 0x2029 ||
         code == 0x202F || code == 0x205F || code == 0x3000;
}

bool ends_in_white_space(std::string_view text) {
  for (size_t length = 1; length <= std::min<size_t>(4, text.size()); ++length) {
    const std::string_view last = text.substr(text.size() - length);
    if (utf8_char_length(last) == length) {
      return is_white_space(utf8_code_point(last));
    }
  }
  return false;
}

// The split pattern, compiled once and read by all threads.
class SplitPattern {
 public:
  // What matching writes to; one per thread.
  using MatchData = std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)>;

  SplitPattern() : code_(nullptr, &pcre2_code_free) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(kSplitPattern),
                              PCRE2_ZERO_TERMINATED,
                              PCRE2_UTF | PCRE2_UCP | PCRE2_ANCHORED,
                              &error,
                              &offset,
                              nullptr));
    if (!code_) {
      throw std::runtime_error("PCRE2 error " + std::to_string(error) + " at character " +
                               std::to_string(offset) + " of the tokenizer's split pattern");
    }
    // Where the processor has no JIT, matching works without, more slowly.
    pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
  }

  MatchData make_match_data() const {
    return {pcre2_match_data_create_from_pattern(code_.get(), nullptr), &pcre2_match_data_free};
  }

  // End of the piece that starts at `start`. `text` must be well-formed UTF-8.
  size_t piece_end(std::string_view text, size_t start, pcre2_match_data* match_data) const {
    const int result = pcre2_match(code_.get(),
                                   reinterpret_cast<PCRE2_SPTR>(text.data()),
                                   text.size(),
                                   start,
                                   PCRE2_NO_UTF_CHECK,
                                   match_data,
                                   nullptr);
    if (result <= 0) {
      throw std::runtime_error("PCRE2 error " + std::to_string(result) + " at byte " +
                               std::to_string(start) + " of a text of " +
                               std::to_string(text.size()) + " bytes");
    }
    return pcre2_get_ovector_pointer(match_data)[1];
  }

 private:
  std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code_;
};

// Added tokens of one stage: finds them in a text from left to right, the longest at each place.
class AddedTokens {
 public:
  AddedTokens() = default;
  explicit AddedTokens(const std::vector<BpeFile::AddedToken>& tokens, bool normalized) {
    std::vector<ByteTrie::Entry> entries;
    for (const BpeFile::AddedToken& token : tokens) {
      if (token.normalized == normalized) {
        entries.push_back({token.content, token.id});
        starts_[static_cast<unsigned char>(token.content[0])] = true;
      }
    }
    trie_ = ByteTrie(std::move(entries));
  }

  // Calls between(text) for each stretch without added tokens, and found(id) for each added token.
  template <typename Between, typename Found>
  void split(std::string_view text, Between between, Found found) const {
    size_t stretch = 0;
    for (size_t i = 0; i < text.size();) {
      if (!starts_[static_cast<unsigned char>(text[i])]) {
        ++i;
        continue;
      }
      const ByteTrie::Match match = trie_.longest(text.substr(i));
      if (match.value < 0) {
        ++i;
        continue;
      }
      between(text.substr(stretch, i - stretch));
      found(match.value);
      i += match.length;
      stretch = i;
    }
    between(text.substr(stretch));
  }

 private:
  ByteTrie trie_;
  std::array<bool, 256> starts_{};
};

}  // namespace

struct BpeTokenizer::Impl {
  Impl(const std::string& path, std::string_view content);

  // Everything one call of encode_part writes to besides `ids`.
  struct Call {
    std::vector<int32_t>& ids;
    SplitPattern::MatchData match_data;
    BpeMerges::Scratch merge_scratch;
    NfcNormalizer nfc;
  };
  void encode_raw(std::string_view text, Call& call) const;
  void encode_stray_byte(unsigned char byte, Call& call) const;
  void encode_well_formed(std::string_view text, Call& call) const;
  void encode_pieces(std::string_view text, Call& call) const;
  size_t safe_cut(std::string_view text) const;

  BpeFile file;
  AddedTokens raw_added;
  AddedTokens normalized_added;
  BpeMerges merges;
  SplitPattern pattern;
  bool may_cut_at_line_end = true;
  bool may_cut_at_space = true;
  std::optional<int32_t> end_of_document;
  std::string identity;
};

BpeTokenizer::Impl::Impl(const std::string& path, std::string_view content)
    : file(parse_bpe_file(path, content)),
      raw_added(file.added_tokens, false),
      normalized_added(file.added_tokens, true),
      identity("neox:" + content_hash(std::as_bytes(std::span(content)))) {
  std::vector<BpeMerges::Token> tokens;
  for (size_t id = 0; id < file.tokens.size(); ++id) {
    if (!file.tokens[id].empty() && !file.is_added[id]) {
      tokens.push_back({file.tokens[id], static_cast<int32_t>(id)});
    }
  }
  try {
    merges = BpeMerges(file.byte_ids, file.merges, tokens);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(path + ": model.merges: " + error.what());
  }
  for (const BpeFile::AddedToken& token : file.added_tokens) {
    if (token.content == "<|endoftext|>") {
      end_of_document = token.id;
    }
    // A token that held a line end could reach across a cut in front of one; a token with a space
    // too, unless it is a run of spaces: the cut is at a lone space.
    const bool is_run =
        token.content.size() > 1 && token.content.find_first_not_of(' ') == std::string::npos;
    may_cut_at_line_end &= token.content.find_first_of("\r\n") == std::string::npos;
    may_cut_at_space &= is_run || token.content.find(' ') == std::string::npos;
  }
}

void BpeTokenizer::Impl::encode_raw(std::string_view text, Call& call) const {
  raw_added.split(
      text,
      [&](std::string_view between) {
        // Cut at bytes that are not UTF-8.
        size_t start = 0;
        for (size_t i = 0; i < between.size();) {
          const size_t length = utf8_char_length(between.substr(i));
          if (length > 0) {
            i += length;
            continue;
          }
          encode_well_formed(between.substr(start, i - start), call);
          encode_stray_byte(static_cast<unsigned char>(between[i]), call);
          start = ++i;
        }
        encode_well_formed(between.substr(start), call);
      },
      [&](int32_t id) { call.ids.push_back(id); });
}

void BpeTokenizer::Impl::encode_stray_byte(unsigned char byte, Call& call) const {
  constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
  if (file.byte_ids[byte] >= 0) {
    call.ids.push_back(file.byte_ids[byte]);
  } else {
    merges.encode(kReplacement, call.ids, call.merge_scratch);
  }
}

void BpeTokenizer::Impl::encode_well_formed(std::string_view text, Call& call) const {
  normalized_added.split(
      call.nfc.normalize(text),
      [&](std::string_view between) { encode_pieces(between, call); },
      [&](int32_t id) { call.ids.push_back(id); });
}

void BpeTokenizer::Impl::encode_pieces(std::string_view text, Call& call) const {
  for (size_t start = 0; start < text.size();) {
    const size_t end = pattern.piece_end(text, start, call.match_data.get());
    merges.encode(text.substr(start, end - start), call.ids, call.merge_scratch);
    start = end;
  }
}

// The last place at which cutting the text changes no id, 0 if there is none.
//
// In front of a line feed or carriage return after a character that is not white space: no added
// token reaches across (none holds one); form C joins nothing to it; every alternative of the split
// pattern that takes the character stops there, and only white space looks ahead. The same holds in
// front of a space that another printing character follows, for then no run of spaces starts there.
size_t BpeTokenizer::Impl::safe_cut(std::string_view text) const {
  for (size_t cut = text.empty() ? 0 : text.size() - 1; cut > 0; --cut) {
    const bool at_line_end = may_cut_at_line_end && (text[cut] == '\n' || text[cut] == '\r');
    const bool at_space = may_cut_at_space && text[cut] == ' ' && cut + 1 < text.size() &&
                          text[cut + 1] > ' ' && text[cut + 1] < 0x7F;
    if ((at_line_end || at_space) && !ends_in_white_space(text.substr(0, cut))) {
      return cut;
    }
  }
  return 0;
}

BpeTokenizer::BpeTokenizer(const std::string& json_path)
    : impl_(std::make_unique<const Impl>(json_path, read_text_file(json_path, kMaxFileBytes))) {}

BpeTokenizer::~BpeTokenizer() = default;

size_t BpeTokenizer::encode_part(std::string_view text,
                                 TextEnd end,
                                 std::vector<int32_t>& ids) const {
  const std::string_view part =
      text.substr(0, end == TextEnd::kFinal ? text.size() : impl_->safe_cut(text));
  if (!part.empty()) {
    Impl::Call call{ids, impl_->pattern.make_match_data(), {}, {}};
    impl_->encode_raw(part, call);
  }
  return part.size();
}

void BpeTokenizer::decode(std::span<const int32_t> ids, std::string& text) const {
  const std::vector<std::string>& tokens = impl_->file.tokens;
  for (const int32_t id : ids) {
    if (id < 0 || static_cast<size_t>(id) >= tokens.size() ||
        tokens[static_cast<size_t>(id)].empty()) {
      throw std::invalid_argument("token id " + std::to_string(id) +
                                  " is not in the vocabulary; its tokens are 0 .. " +
                                  std::to_string(tokens.size() - 1));
    }
    text += tokens[static_cast<size_t>(id)];
  }
}

int64_t BpeTokenizer::vocab_size() const {
  return static_cast<int64_t>(impl_->file.tokens.size());
}

std::optional<int32_t> BpeTokenizer::end_of_document() const {
  return impl_->end_of_document;
}

std::string BpeTokenizer::identity() const {
  return impl_->identity;
}

}  // namespace rwkv
