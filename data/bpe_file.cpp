#include "data/bpe_file.h"

#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <unordered_map>

#include <nlohmann/json.hpp>

#include "data/json_text.h"
#include "data/utf8.h"

namespace rwkv {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxId = (1 << 24) - 1;

// GPT-2's alphabet: every byte is written as one printable character. 188 bytes stand for the code
// point of their own number, the other 68 follow each other from U+0100 on.
class ByteAlphabet {
 public:
  ByteAlphabet() {
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable =
          (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      bytes_[printable ? byte : next++] = static_cast<char>(byte);
    }
  }

  // Nothing if `text` (well-formed UTF-8) has a character outside the alphabet.
  std::optional<std::string> bytes_of(std::string_view text) const {
    std::string bytes;
    for (size_t i = 0; i < text.size(); i += utf8_char_length(text.substr(i))) {
      const auto found = bytes_.find(utf8_code_point(text.substr(i)));
      if (found == bytes_.end()) {
        return std::nullopt;
      }
      bytes += found->second;
    }
    return bytes;
  }

 private:
  std::unordered_map<uint32_t, char> bytes_;
};

class Parser {
 public:
  Parser(const std::string& path, std::string_view content)
      : path_(path), root_(parse_json(content, path, "expected a tokenizers file")) {}

  BpeFile parse() {
    check_pipeline();
    read_vocabulary();
    read_merges();
    read_added_tokens();
    find_bytes();
    return std::move(file_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(path_ + ": " + what);
  }

  // The value of a key, null if it is absent.
  const Json& get(const Json& object, const char* key, const std::string& where) const {
    static const Json null;
    if (!object.is_object()) {
      fail(where + " is " + shown_json(object) + ", expected an object");
    }
    const auto found = object.find(key);
    return found == object.end() ? null : *found;
  }

  // Refuses a setting that would change the ids and that this program does not follow.
  void expect(const Json& object, const std::string& where, const char* key, const Json& expected) {
    const Json& value = get(object, key, where);
    const bool is_off = value.is_null() && (expected.is_null() || expected == Json(false));
    const bool empty_string = expected.is_null() && value == Json("");
    if (value != expected && !is_off && !empty_string) {
      fail(where + "." + key + " is " + shown_json(value) + ", expected " + shown_json(expected) +
           "; only byte-level BPE as in 20B_tokenizer.json is supported");
    }
  }

  void check_pipeline() {
    expect(root_, "the file", "truncation", nullptr);
    expect(root_, "the file", "padding", nullptr);
    expect(get(root_, "normalizer", "the file"), "normalizer", "type", "NFC");
    const Json& splitter = get(root_, "pre_tokenizer", "the file");
    expect(splitter, "pre_tokenizer", "type", "ByteLevel");
    expect(splitter, "pre_tokenizer", "add_prefix_space", false);
    if (!get(splitter, "use_regex", "pre_tokenizer").is_null()) {
      expect(splitter, "pre_tokenizer", "use_regex", true);
    }
    const Json& post_processor = get(root_, "post_processor", "the file");
    if (!post_processor.is_null()) {
      expect(post_processor, "post_processor", "type", "ByteLevel");
    }
    expect(get(root_, "decoder", "the file"), "decoder", "type", "ByteLevel");
    const Json& model = get(root_, "model", "the file");
    expect(model, "model", "type", "BPE");
    for (const char* key :
         {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"}) {
      expect(model, "model", key, nullptr);
    }
    for (const char* key : {"fuse_unk", "byte_fallback", "ignore_merges"}) {
      expect(model, "model", key, false);
    }
  }

  int32_t id_of(const Json& value, const std::string& what) const {
    if (!value.is_number_integer() || value.get<int64_t>() < 0 || value.get<int64_t>() > kMaxId) {
      fail("the id of " + what + " is " + shown_json(value) + ", expected a whole number 0 .. " +
           std::to_string(kMaxId));
    }
    return value.get<int32_t>();
  }

  void set_token(int32_t id, const std::string& bytes, const std::string& what) {
    const auto index = static_cast<size_t>(id);
    if (index >= file_.tokens.size()) {
      file_.tokens.resize(index + 1);
      file_.is_added.resize(index + 1);
    }
    if (!file_.tokens[index].empty()) {
      fail(what + " has the id " + std::to_string(id) + ", which another token has already");
    }
    file_.tokens[index] = bytes;
  }

  void read_vocabulary() {
    const Json& vocabulary = get(root_["model"], "vocab", "model");
    if (!vocabulary.is_object() || vocabulary.empty()) {
      fail("model.vocab is " + shown_json(vocabulary) + ", expected an object of tokens and ids");
    }
    const ByteAlphabet alphabet;
    for (const auto& [name, value] : vocabulary.items()) {
      const std::string what = "model.vocab token " + shown_json(Json(name));
      const int32_t id = id_of(value, what);
      const std::optional<std::string> bytes = alphabet.bytes_of(name);
      if (name.empty() || !bytes) {
        fail(what + " is not written in the byte-level alphabet");
      }
      set_token(id, *bytes, what);
      ids_.emplace(name, id);
    }
  }

  int32_t merged_id(const std::string& name, size_t rank) const {
    const auto found = ids_.find(name);
    if (found == ids_.end()) {
      fail("model.merges[" + std::to_string(rank) + "] needs the token " + shown_json(Json(name)) +
           ", which model.vocab does not have");
    }
    return found->second;
  }

  // A merge is "left right", or ["left", "right"] in files of newer versions.
  void read_merges() {
    const Json& merges = get(root_["model"], "merges", "model");
    if (!merges.is_array()) {
      fail("model.merges is " + shown_json(merges) + ", expected a list");
    }
    for (const Json& merge : merges) {
      const size_t rank = file_.merges.size();
      std::string left;
      std::string right;
      if (merge.is_string()) {
        const auto& text = merge.get_ref<const std::string&>();
        const size_t space = std::min(text.find(' '), text.size());
        left = text.substr(0, space);
        right = text.substr(std::min(space + 1, text.size()));
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() &&
                 merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      }
      if (left.empty() || right.empty()) {
        fail("model.merges[" + std::to_string(rank) + "] is " + shown_json(merge) +
             ", expected \"LEFT RIGHT\"");
      }
      const int32_t left_id = merged_id(left, rank);
      const int32_t right_id = merged_id(right, rank);
      file_.merges.push_back({left_id, right_id, merged_id(left + right, rank)});
    }
  }

  void read_added_tokens() {
    const Json& added = get(root_, "added_tokens", "the file");
    if (!added.is_array()) {
      fail("added_tokens is " + shown_json(added) + ", expected a list");
    }
    for (const Json& entry : added) {
      const std::string where = "added_tokens[" + std::to_string(file_.added_tokens.size()) + "]";
      const Json& content = get(entry, "content", where);
      const Json& normalized = get(entry, "normalized", where);
      if (!content.is_string() || content.get_ref<const std::string&>().empty()) {
        fail(where + ".content is " + shown_json(content) + ", expected a text");
      }
      if (!normalized.is_boolean()) {
        fail(where + ".normalized is " + shown_json(normalized) + ", expected true or false");
      }
      for (const char* key : {"single_word", "lstrip", "rstrip"}) {
        expect(entry, where, key, false);
      }
      const int32_t id = id_of(get(entry, "id", where), where);
      const std::string text = content.get<std::string>();
      if (!added_.insert(text).second) {
        fail(where + " is " + shown_json(content) + ", which is in the list already");
      }
      // The special ones are in model.vocab as well.
      const auto in_vocabulary = ids_.find(text);
      if (in_vocabulary == ids_.end()) {
        set_token(id, text, where);
      } else if (in_vocabulary->second != id) {
        fail(where + " is " + shown_json(content) + " with the id " + std::to_string(id) +
             ", but model.vocab gives it " + std::to_string(in_vocabulary->second));
      }
      file_.tokens[static_cast<size_t>(id)] = text;
      file_.is_added[static_cast<size_t>(id)] = true;
      file_.added_tokens.push_back({id, text, normalized.get<bool>()});
    }
  }

  void find_bytes() {
    file_.byte_ids.fill(-1);
    for (size_t id = 0; id < file_.tokens.size(); ++id) {
      if (file_.tokens[id].size() == 1 && !file_.is_added[id]) {
        file_.byte_ids[static_cast<unsigned char>(file_.tokens[id][0])] = static_cast<int32_t>(id);
      }
    }
    for (size_t byte = 0; byte < 256; ++byte) {
      const bool in_utf8 = byte != 0xC0 && byte != 0xC1 && byte < 0xF5;
      if (in_utf8 && file_.byte_ids[byte] < 0) {
        fail("model.vocab lacks a token for the byte " + std::to_string(byte) +
             ", so that some texts could not be encoded");
      }
    }
  }

  const std::string& path_;
  Json root_;
  BpeFile file_;
  // Ordered: a file cannot choose names that collide.
  std::map<std::string, int32_t> ids_;  // of model.vocab, by name as written
  std::set<std::string> added_;
};

}  // namespace

BpeFile parse_bpe_file(const std::string& path, std::string_view content) {
  return Parser(path, content).parse();
}

}  // namespace rwkv
