#include "data/json_text.h"

#include <set>
#include <stdexcept>
#include <vector>

namespace rwkv {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxDepth = 64;
constexpr size_t kShownBytes = 80;

// Goes through a text and keeps only the keys of the objects that are open. The library's own hook
// for such checks, the callback of its parser, takes quadratic time for a list of objects.
class Checker : public Json::json_sax_t {
 public:
  Checker(const std::string& where, const std::string& advice) : where_(where), advice_(advice) {}

  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) {
      fail("has the key " + shown_json(name) + " twice, expected it once");
    }
    return true;
  }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  // The library's own text quotes what it read last, which may be the whole file.
  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    const bool too_large = error.id == 406;
    fail(too_large ? "is not JSON: a number is too large"
                   : "is not JSON: broken at byte " + std::to_string(position));
  }

 private:
  bool open() {
    keys_.emplace_back();
    if (keys_.size() > kMaxDepth) {
      fail("values are nested deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(where_ + ": " + what + "; " + advice_);
  }

  const std::string& where_;
  const std::string& advice_;
  std::vector<std::set<std::string>> keys_;  // of each open object; empty for a list
};

}  // namespace

nlohmann::json parse_json(std::string_view text,
                          const std::string& where,
                          const std::string& advice) {
  Checker checker(where, advice);
  Json::sax_parse(text, &checker);
  return Json::parse(text);
}

std::string shown_json(const nlohmann::json& value) {
  const std::string text = value.dump(-1, ' ', false, Json::error_handler_t::replace);
  return text.size() <= kShownBytes ? text : text.substr(0, kShownBytes) + "...";
}

}  // namespace rwkv
