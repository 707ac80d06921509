#include "model/formats/pickle.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <map>
#include <stdexcept>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

using Kind = PickleValue::Kind;

// The state dict of a 14B model has about 30,000 values in 0.3 MB. These limits leave room for
// lists of numbers that trainers put beside it, and bound what a hostile file costs: 64 bytes a
// value, 4 bytes of a container's items for each byte read.
constexpr size_t kMaxValues = size_t{1} << 20;
constexpr size_t kMaxBytes = size_t{64} << 20;
// Marks that are open at once: a pickle of nested tuples opens one for each level.
constexpr size_t kMaxDepth = 256;
// Values that wait on the stack: save() of Python puts a container's items down 1,000 at a time.
constexpr size_t kMaxStack = size_t{1} << 20;

enum Opcode : unsigned char {
  kMark = '(',
  kStop = '.',
  kPop = '0',
  kPopMark = '1',
  kDup = '2',
  kBinFloat = 'G',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNone = 'N',
  kBinPersistentId = 'Q',
  kReduce = 'R',
  kBinString = 'T',
  kShortBinString = 'U',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kSetItems = 'u',
  kEmptyTuple = ')',
  kEmptyList = ']',
  kEmptyDict = '}',
  kBinBytes = 'B',
  kShortBinBytes = 'C',
  kProto = 0x80,
  kNewObject = 0x81,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
  kShortBinUnicode = 0x8c,
  kBinUnicode8 = 0x8d,
  kBinBytes8 = 0x8e,
  kStackGlobal = 0x93,
  kMemoize = 0x94,
  kFrame = 0x95,
};

// Opcodes that exist and are refused, for the error text.
constexpr std::pair<unsigned char, const char*> kRefusedOpcodes[] = {
    {'F', "FLOAT"},
    {'I', "INT"},
    {'L', "LONG"},
    {'P', "PERSID"},
    {'S', "STRING"},
    {'V', "UNICODE"},
    {'d', "DICT"},
    {'g', "GET"},
    {'i', "INST"},
    {'l', "LIST"},
    {'o', "OBJ"},
    {'p', "PUT"},
    {0x82, "EXT1"},
    {0x83, "EXT2"},
    {0x84, "EXT4"},
    {0x8b, "LONG4"},
    {0x8f, "EMPTY_SET"},
    {0x90, "ADDITEMS"},
    {0x91, "FROZENSET"},
    {0x92, "NEWOBJ_EX"},
    {0x96, "BYTEARRAY8"},
    {0x97, "NEXT_BUFFER"},
    {0x98, "READONLY_BUFFER"},
};

class Machine {
 public:
  Machine(std::span<const std::byte> bytes,
          const std::string& where,
          std::span<const std::string_view> allowed_globals)
      : text_(reinterpret_cast<const char*>(bytes.data()), std::min(bytes.size(), kMaxBytes)),
        where_(where),
        allowed_globals_(allowed_globals) {
    pickle_.values.resize(4);
    pickle_.values[kTrueIndex] = {.kind = Kind::kBool, .integer = 1, .text = {}, .items = {}};
    pickle_.values[kFalseIndex].kind = Kind::kBool;
    pickle_.values[kEmptyTupleIndex].kind = Kind::kTuple;
  }

  Pickle run() {
    while (!stopped_) {
      opcode_at_ = at_;
      step(static_cast<unsigned char>(take(1)[0]));
      if (stack_.size() > kMaxStack) {
        fail("more than " + std::to_string(kMaxStack) +
             " values wait on the stack, far more than a state dict needs");
      }
    }
    if (stack_.size() != 1 || !marks_.empty()) {
      fail("it ends with " + std::to_string(stack_.size()) + " values on the stack, expected 1");
    }
    pickle_.root = stack_.front();
    pickle_.bytes_read = at_;
    return std::move(pickle_);
  }

 private:
  // Values that never change exist once: their opcodes are one byte each.
  static constexpr PickleIndex kNoneIndex = 0;
  static constexpr PickleIndex kTrueIndex = 1;
  static constexpr PickleIndex kFalseIndex = 2;
  static constexpr PickleIndex kEmptyTupleIndex = 3;

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(where_ + ": at byte " + std::to_string(opcode_at_) +
                             " of the pickle " + what + "; the file is damaged");
  }

  [[noreturn]] void refuse(const std::string& wanted) const {
    throw std::runtime_error(where_ + " wants " + wanted +
                             ", which a state dict does not need; refused. If this is a whole "
                             "pickled object, save its state_dict() instead");
  }

  std::string_view take(uint64_t count) {
    if (count > text_.size() - at_) {
      if (text_.size() == kMaxBytes) {
        fail("it goes on beyond " + std::to_string(kMaxBytes) +
             " bytes, far more than a state dict has");
      }
      fail("it wants " + std::to_string(count) + " bytes where " +
           std::to_string(text_.size() - at_) + " are left: it is cut short");
    }
    const std::string_view taken = text_.substr(at_, count);
    at_ += count;
    return taken;
  }

  template <class T>
  T take_number() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }

  std::string_view take_line() {
    const size_t end = text_.find('\n', at_);
    if (end == std::string_view::npos) {
      fail("a line does not end: it is cut short");
    }
    const std::string_view line = text_.substr(at_, end - at_);
    at_ = end + 1;
    return line;
  }

  PickleIndex add(PickleValue value) {
    if (pickle_.values.size() >= kMaxValues) {
      fail("there are more than " + std::to_string(kMaxValues) +
           " values, far more than a state dict has");
    }
    pickle_.values.push_back(std::move(value));
    return static_cast<PickleIndex>(pickle_.values.size() - 1);
  }

  void push(PickleValue value) { stack_.push_back(add(std::move(value))); }
  void push_text(Kind kind, std::string_view text) {
    push({.kind = kind, .text = text, .items = {}});
  }
  void push_integer(int64_t value) {
    push({.kind = Kind::kInteger, .integer = value, .text = {}, .items = {}});
  }
  void push_items(Kind kind, std::vector<PickleIndex> items) {
    push({.kind = kind, .text = {}, .items = std::move(items)});
  }

  // What lies below an open mark belongs to the outer container and is out of reach.
  size_t reachable() const { return stack_.size() - (marks_.empty() ? 0 : marks_.back()); }

  PickleIndex pop() {
    if (reachable() == 0) {
      fail("an opcode wants a value where there is none");
    }
    const PickleIndex top = stack_.back();
    stack_.pop_back();
    return top;
  }

  PickleIndex top() const {
    if (reachable() == 0) {
      fail("an opcode wants a value where there is none");
    }
    return stack_.back();
  }

  std::vector<PickleIndex> pop_last(size_t count) {
    if (reachable() < count) {
      fail("an opcode wants " + std::to_string(count) + " values where there are " +
           std::to_string(reachable()));
    }
    const auto first = stack_.end() - static_cast<ptrdiff_t>(count);
    std::vector<PickleIndex> items(first, stack_.end());
    stack_.erase(first, stack_.end());
    return items;
  }

  std::vector<PickleIndex> pop_to_mark() {
    if (marks_.empty()) {
      fail("an opcode wants a mark where there is none");
    }
    std::vector<PickleIndex> items = pop_last(reachable());
    marks_.pop_back();
    return items;
  }

  void extend(Kind kind, const std::vector<PickleIndex>& items) {
    PickleValue& container = pickle_.values[top()];
    if (container.kind != kind || (kind == Kind::kDict && items.size() % 2 != 0)) {
      fail("items are put where there is no container for them");
    }
    container.items.insert(container.items.end(), items.begin(), items.end());
  }

  void put(PickleIndex key) {
    memo_[key] = top();
    if (memo_.size() > kMaxValues) {
      fail("there are more than " + std::to_string(kMaxValues) +
           " memo entries, far more than a state dict has");
    }
  }

  void get(PickleIndex key) {
    const auto found = memo_.find(key);
    if (found == memo_.end()) {
      fail("it refers to memo " + std::to_string(key) + ", which was never set");
    }
    stack_.push_back(found->second);
  }

  void push_global(std::string_view module, std::string_view name) {
    // Compared in parts: a name may be as long as the file.
    for (const std::string_view allowed : allowed_globals_) {
      if (allowed.size() == module.size() + 1 + name.size() && allowed.starts_with(module) &&
          allowed[module.size()] == '.' && allowed.ends_with(name)) {
        push_text(Kind::kGlobal, allowed);
        return;
      }
    }
    const std::string full =
        std::string(module.substr(0, 80)) + "." + std::string(name.substr(0, 80));
    const std::string shown = in_quotes(full);
    refuse(shown.substr(1, shown.size() - 2));
  }

  std::string_view pop_text() {
    const PickleValue& value = pickle_.values[pop()];
    if (value.kind != Kind::kText) {
      fail("a global is not named by text");
    }
    return value.text;
  }

  void call() {
    const std::vector<PickleIndex> items = pop_last(2);
    const PickleValue& callee = pickle_.values[items[0]];
    const PickleValue& arguments = pickle_.values[items[1]];
    if (callee.kind != Kind::kGlobal || arguments.kind != Kind::kTuple) {
      fail("something is called that is not a global with a tuple of arguments");
    }
    if (callee.text == "collections.OrderedDict" && arguments.items.empty()) {
      push_items(Kind::kDict, {});
    } else {
      push_items(Kind::kCall, items);
    }
  }

  void push_long(std::string_view little_endian) {
    if (little_endian.size() > sizeof(int64_t)) {
      push_text(Kind::kBigInteger, little_endian);
      return;
    }
    uint64_t value = 0;
    for (size_t i = 0; i < little_endian.size(); ++i) {
      value |= static_cast<uint64_t>(static_cast<unsigned char>(little_endian[i])) << (8 * i);
    }
    const unsigned unused_bits = 64 - 8 * static_cast<unsigned>(little_endian.size());
    // Shifting up and down again carries the sign into the bytes that were not given.
    push_integer(unused_bits == 64 ? 0 : static_cast<int64_t>(value << unused_bits) >> unused_bits);
  }

  void push_float() {
    uint64_t bits = 0;
    for (const char c : take(8)) {
      bits = bits << 8 | static_cast<unsigned char>(c);
    }
    push({.kind = Kind::kFloat, .real = std::bit_cast<double>(bits), .text = {}, .items = {}});
  }

  void step(unsigned char opcode) {
    switch (opcode) {
      case kProto:
        if (const auto protocol = take_number<uint8_t>(); protocol < 2 || protocol > 5) {
          fail("the protocol is " + std::to_string(protocol) + ", expected 2 to 5");
        }
        return;
      case kFrame:
        // A frame only helps a reader that reads from a pipe.
        take_number<uint64_t>();
        return;
      case kStop:
        stopped_ = true;
        return;

      case kMark:
        if (marks_.size() >= kMaxDepth) {
          fail("values are nested deeper than " + std::to_string(kMaxDepth) + " levels");
        }
        marks_.push_back(stack_.size());
        return;
      case kPop:
        // As in Python, POP right after MARK takes the mark.
        if (reachable() == 0 && !marks_.empty()) {
          marks_.pop_back();
        } else {
          pop();
        }
        return;
      case kPopMark:
        pop_to_mark();
        return;
      case kDup:
        stack_.push_back(top());
        return;

      case kNone:
        stack_.push_back(kNoneIndex);
        return;
      case kNewTrue:
        stack_.push_back(kTrueIndex);
        return;
      case kNewFalse:
        stack_.push_back(kFalseIndex);
        return;
      case kBinInt:
        push_integer(take_number<int32_t>());
        return;
      case kBinInt1:
        push_integer(take_number<uint8_t>());
        return;
      case kBinInt2:
        push_integer(take_number<uint16_t>());
        return;
      case kLong1:
        push_long(take(take_number<uint8_t>()));
        return;
      case kBinFloat:
        push_float();
        return;

      case kShortBinUnicode:
      // Python 2 wrote its str, which is what names were, as these two.
      case kShortBinString:
        push_text(Kind::kText, take(take_number<uint8_t>()));
        return;
      case kBinUnicode:
      case kBinString:
        push_text(Kind::kText, take(take_number<uint32_t>()));
        return;
      case kBinUnicode8:
        push_text(Kind::kText, take(take_number<uint64_t>()));
        return;
      case kShortBinBytes:
        push_text(Kind::kBytes, take(take_number<uint8_t>()));
        return;
      case kBinBytes:
        push_text(Kind::kBytes, take(take_number<uint32_t>()));
        return;
      case kBinBytes8:
        push_text(Kind::kBytes, take(take_number<uint64_t>()));
        return;

      case kEmptyTuple:
        stack_.push_back(kEmptyTupleIndex);
        return;
      case kTuple1:
        push_items(Kind::kTuple, pop_last(1));
        return;
      case kTuple2:
        push_items(Kind::kTuple, pop_last(2));
        return;
      case kTuple3:
        push_items(Kind::kTuple, pop_last(3));
        return;
      case kTuple:
        push_items(Kind::kTuple, pop_to_mark());
        return;
      case kEmptyList:
        push_items(Kind::kList, {});
        return;
      case kAppend:
        extend(Kind::kList, pop_last(1));
        return;
      case kAppends:
        extend(Kind::kList, pop_to_mark());
        return;
      case kEmptyDict:
        push_items(Kind::kDict, {});
        return;
      case kSetItem:
        extend(Kind::kDict, pop_last(2));
        return;
      case kSetItems:
        extend(Kind::kDict, pop_to_mark());
        return;

      case kBinPut:
        put(take_number<uint8_t>());
        return;
      case kLongBinPut:
        put(take_number<uint32_t>());
        return;
      case kMemoize:
        put(static_cast<PickleIndex>(memo_.size()));
        return;
      case kBinGet:
        get(take_number<uint8_t>());
        return;
      case kLongBinGet:
        get(take_number<uint32_t>());
        return;

      case kGlobal: {
        const std::string_view module = take_line();
        push_global(module, take_line());
        return;
      }
      case kStackGlobal: {
        const std::string_view name = pop_text();
        push_global(pop_text(), name);
        return;
      }
      case kReduce:
      case kNewObject:
        call();
        return;
      case kBuild:
        // The state of an object (_metadata of a state dict): not part of its items.
        pop();
        top();
        return;
      case kBinPersistentId:
        push_items(Kind::kPersistent, pop_last(1));
        return;
      default:
        refuse_opcode(opcode);
    }
  }

  [[noreturn]] void refuse_opcode(unsigned char opcode) const {
    for (const auto& [code, name] : kRefusedOpcodes) {
      if (code == opcode) {
        refuse("the pickle opcode " + std::string(name));
      }
    }
    fail("there is no opcode " + std::to_string(opcode));
  }

  std::string_view text_;
  const std::string& where_;
  std::span<const std::string_view> allowed_globals_;
  Pickle pickle_;
  std::vector<PickleIndex> stack_;
  std::vector<size_t> marks_;
  // Ordered: a file cannot choose keys that collide.
  std::map<PickleIndex, PickleIndex> memo_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  bool stopped_ = false;
};

template <class T>
void append_number(std::string& text, T value) {
  text.append(reinterpret_cast<const char*>(&value), sizeof value);
}

}  // namespace

Pickle read_pickle(std::span<const std::byte> bytes,
                   const std::string& where,
                   std::span<const std::string_view> allowed_globals) {
  return Machine(bytes, where, allowed_globals).run();
}

PickleWriter::PickleWriter() : text_("\x80\x02") {}

void PickleWriter::integer(int64_t value) {
  if (value >= 0 && value <= UINT8_MAX) {
    text_ += 'K';
    append_number(text_, static_cast<uint8_t>(value));
  } else if (value >= 0 && value <= UINT16_MAX) {
    text_ += 'M';
    append_number(text_, static_cast<uint16_t>(value));
  } else if (value >= INT32_MIN && value <= INT32_MAX) {
    text_ += 'J';
    append_number(text_, static_cast<int32_t>(value));
  } else {
    text_ += "\x8a\x08";
    append_number(text_, value);
  }
}

void PickleWriter::text(std::string_view utf8) {
  text_ += 'X';
  append_number(text_, static_cast<uint32_t>(utf8.size()));
  text_ += utf8;
}

void PickleWriter::global(std::string_view module, std::string_view name) {
  text_ += 'c';
  text_ += module;
  text_ += '\n';
  text_ += name;
  text_ += '\n';
}

std::string PickleWriter::finish() {
  return std::move(text_) + '.';
}

}  // namespace rwkv
