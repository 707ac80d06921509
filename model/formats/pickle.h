// Python pickles of data alone: a stack machine that builds descriptions and runs nothing.
//
// Known are the opcodes of protocols 2 to 5 for None, bools, numbers, text, bytes, tuples, lists,
// dicts, memo references, globals, calls and persistent ids. A global must be one that the caller
// allows; a call is kept as "this global with these arguments", except collections.OrderedDict(),
// which is an empty dict. The state that BUILD would set is passed over.
// Source: CPython Lib/pickletools.py (opcodes and their arguments).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

// A value's place in Pickle::values. Values refer to each other by it, so that neither sharing nor
// depth nor a list that holds itself costs memory or recursion.
using PickleIndex = uint32_t;

struct PickleValue {
  enum class Kind {
    kNone,
    kBool,        // integer: 0 or 1
    kInteger,     // integer
    kBigInteger,  // text: the bytes of an integer beyond int64, two's complement, low byte first
    kFloat,       // real
    kText,        // text
    kBytes,       // text
    kTuple,       // items: the elements
    kList,        // items: the elements
    kDict,        // items: key, value, key, value, ... in the order set, repeated keys too
    kGlobal,      // text: "module.name"
    kCall,        // items: the global called, the tuple of arguments
    kPersistent,  // items: the persistent id
  };
  Kind kind = Kind::kNone;
  int64_t integer = 0;
  double real = 0;
  std::string_view text;  // points into the bytes read, or into the list of allowed globals
  std::vector<PickleIndex> items;
};

struct Pickle {
  std::vector<PickleValue> values;
  PickleIndex root = 0;
  size_t bytes_read = 0;  // a pickle ends itself; others may follow

  const PickleValue& operator[](PickleIndex index) const { return values[index]; }
};

// Reads one pickle from the front of `bytes`. `allowed_globals` are "module.name".
// Bounded, whatever the file says: 2^20 values, as many on the stack, 64 MiB of pickle, marks
// nested 256 deep.
// Throws std::runtime_error, starting with `where` ("x.pth: data.pkl"), for a global that is not
// allowed and an opcode that is not known, by their names, and for a pickle that is cut short or
// breaks the machine's rules.
Pickle read_pickle(std::span<const std::byte> bytes,
                   const std::string& where,
                   std::span<const std::string_view> allowed_globals);

// Writes protocol 2, the opcodes that torch.save uses. Values are written as they come: what a
// container holds goes between its opening and closing call.
class PickleWriter {
 public:
  PickleWriter();
  void mark() { text_ += '('; }
  // Makes a tuple of what was written since the last mark().
  void tuple() { text_ += 't'; }
  void empty_tuple() { text_ += ')'; }
  void integer(int64_t value);
  void boolean(bool value) { text_ += value ? '\x88' : '\x89'; }
  void text(std::string_view utf8);
  void global(std::string_view module, std::string_view name);
  // Calls the last value but one with the last, a tuple.
  void call() { text_ += 'R'; }
  // The last value, a tuple, is a persistent id.
  void persistent() { text_ += 'Q'; }
  // Sets the last value but one, a text, to the last in the dict before them.
  void set_item() { text_ += 's'; }
  // Ends the pickle and gives its bytes.
  std::string finish();

 private:
  std::string text_;
};

}  // namespace rwkv
