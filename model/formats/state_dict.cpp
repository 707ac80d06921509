#include "model/formats/state_dict.h"

#include <algorithm>
#include <array>
#include <stdexcept>

#include "model/formats/checks.h"

namespace rwkv {
namespace {

using Kind = PickleValue::Kind;

struct StorageClass {
  WeightDtype dtype;
  std::string_view global;
};

constexpr std::array kStorageClasses = {
    StorageClass{WeightDtype::kF64, "torch.DoubleStorage"},
    StorageClass{WeightDtype::kF32, "torch.FloatStorage"},
    StorageClass{WeightDtype::kF16, "torch.HalfStorage"},
    StorageClass{WeightDtype::kBf16, "torch.BFloat16Storage"},
    StorageClass{WeightDtype::kI64, "torch.LongStorage"},
    StorageClass{WeightDtype::kI32, "torch.IntStorage"},
    StorageClass{WeightDtype::kI16, "torch.ShortStorage"},
    StorageClass{WeightDtype::kI8, "torch.CharStorage"},
    StorageClass{WeightDtype::kU8, "torch.ByteStorage"},
    StorageClass{WeightDtype::kBool, "torch.BoolStorage"},
};

constexpr std::string_view kTensorV2 = "torch._utils._rebuild_tensor_v2";
constexpr std::string_view kTensorV1 = "torch._utils._rebuild_tensor";
constexpr std::string_view kParameter = "torch._utils._rebuild_parameter";
constexpr std::string_view kSize = "torch.Size";

constexpr std::string_view kGlobals[] = {
    "collections.OrderedDict",
    kTensorV2,
    kTensorV1,
    kParameter,
    kSize,
    "torch.DoubleStorage",
    "torch.FloatStorage",
    "torch.HalfStorage",
    "torch.BFloat16Storage",
    "torch.LongStorage",
    "torch.IntStorage",
    "torch.ShortStorage",
    "torch.CharStorage",
    "torch.ByteStorage",
    "torch.BoolStorage",
    // Values beside the tensors.
    "torch.float64",
    "torch.double",
    "torch.float32",
    "torch.float",
    "torch.float16",
    "torch.half",
    "torch.bfloat16",
    "torch.int64",
    "torch.long",
    "torch.int32",
    "torch.int",
    "torch.int16",
    "torch.short",
    "torch.int8",
    "torch.uint8",
    "torch.bool",
};

// Where trainers put a state dict: Lightning, DeepSpeed, and usual habit.
constexpr std::string_view kWrapperKeys[] = {
    "state_dict", "model_state_dict", "model", "module", "weights"};
// What trainers put before each name: DeepSpeed under Lightning, DistributedDataParallel, a model
// that is a member of the trained module, torch.compile.
constexpr std::string_view kPrefixes[] = {"_forward_module.", "module.", "model.", "_orig_mod."};
// A state dict lies one or two dicts deep; what is deeper is not looked at.
constexpr int kMaxDictDepth = 4;
// RWKV has at most four dimensions, and PyTorch's keys are numbers of some digits. The limits keep
// a shape or a key that many tensors share from multiplying.
constexpr size_t kMaxKeyBytes = 64;

// A value as an error text may show it.
std::string shown(const PickleValue& value) {
  switch (value.kind) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return value.integer != 0 ? "True" : "False";
    case Kind::kInteger:
      return std::to_string(value.integer);
    case Kind::kBigInteger:
      return "a number of more than 64 bits";
    case Kind::kFloat:
      return std::to_string(value.real);
    case Kind::kText:
      return in_quotes(value.text);
    case Kind::kBytes:
      return "bytes";
    case Kind::kTuple:
      return "a tuple of " + std::to_string(value.items.size());
    case Kind::kList:
      return "a list";
    case Kind::kDict:
      return "a dict";
    case Kind::kGlobal:
      return std::string(value.text);
    case Kind::kCall:
    case Kind::kPersistent:
      return "an object";
  }
  return "";
}

class Reader {
 public:
  Reader(const Pickle& pickle, const std::string& where)
      : pickle_(pickle), where_(where), seen_(pickle.values.size(), false) {}

  std::vector<TensorReference> read() {
    const std::optional<PickleIndex> found = find_dict(pickle_.root, 0);
    if (!found) {
      fail("holds no dict of tensors, expected a state dict (torch.save(model.state_dict(), ...))");
    }
    refuse_converted(pickle_.root);
    refuse_converted(*found);
    // Names before tensors: a text may be shared, and one of megabytes under a million keys must be
    // refused before it is copied.
    const std::vector<PickleIndex>& items = pickle_[*found].items;
    std::vector<std::string_view> names;
    std::vector<PickleIndex> values;
    for (size_t i = 0; i < items.size(); i += 2) {
      if (is_tensor(items[i + 1])) {
        if (pickle_[items[i]].kind != Kind::kText) {
          fail("a tensor is filed under " + shown(pickle_[items[i]]) +
               ", expected its name, a text");
        }
        if (names.size() == kMaxTensors) {
          fail("there are more than " + std::to_string(kMaxTensors) +
               " tensors, far more than a model has; the file is damaged");
        }
        names.push_back(pickle_[items[i]].text);
        values.push_back(items[i + 1]);
      }
    }
    check_stored_names(names, where_);
    std::vector<TensorReference> tensors;
    tensors.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
      tensors.push_back(to_tensor(values[i], names[i]));
    }
    take_off_prefixes(tensors);
    return tensors;
  }

  // `owner` is for the error texts: the tensor, if it is known.
  StorageReference to_storage(PickleIndex index, const std::string& owner) const {
    const PickleValue& value = pickle_[index];
    if (value.kind != Kind::kPersistent) {
      fail(owner + " has " + shown(value) + " as its storage, expected one; the file is damaged");
    }
    const PickleValue& id = pickle_[value.items[0]];
    if (id.kind != Kind::kTuple || id.items.size() < 5 || id.items.size() > 6 ||
        text_of(id.items[0]) != "storage" || pickle_[id.items[1]].kind != Kind::kGlobal ||
        pickle_[id.items[2]].kind != Kind::kText ||
        pickle_[id.items[2]].text.size() > kMaxKeyBytes) {
      fail("the storage of " + owner + " is " + shown(id) +
           ", expected (\"storage\", class, key, location, numel); the file is damaged");
    }
    const std::string_view global = pickle_[id.items[1]].text;
    const auto row = std::find_if(kStorageClasses.begin(),
                                  kStorageClasses.end(),
                                  [&](const auto& r) { return r.global == global; });
    if (row == kStorageClasses.end()) {
      fail("the storage of " + owner + " is of class " + in_quotes(global) +
           ", expected torch.FloatStorage or alike");
    }
    StorageReference storage{.key = text_of(id.items[2]),
                             .dtype = row->dtype,
                             .num_elements = to_integer(id.items[4], owner, "numel"),
                             .view = std::nullopt};
    if (id.items.size() == 6 && pickle_[id.items[5]].kind != Kind::kNone) {
      const PickleValue& view = pickle_[id.items[5]];
      if (view.kind != Kind::kTuple || view.items.size() != 3) {
        fail("the view of the storage of " + owner + " is " + shown(view) +
             ", expected (key, offset, numel); the file is damaged");
      }
      storage.view = {.offset = to_integer(view.items[1], owner, "view's offset"),
                      .num_elements = to_integer(view.items[2], owner, "view's numel")};
    }
    return storage;
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(where_ + ": " + what);
  }

  // Empty for anything but text.
  std::string_view text_of(PickleIndex index) const {
    const PickleValue& value = pickle_[index];
    return value.kind == Kind::kText ? value.text : std::string_view();
  }

  int64_t to_integer(PickleIndex index, const std::string& owner, const std::string& what) const {
    const PickleValue& value = pickle_[index];
    if (value.kind != Kind::kInteger || value.integer < 0) {
      fail(owner + " has the " + what + " " + shown(value) +
           ", expected a whole number of at least 0; the file is damaged");
    }
    return value.integer;
  }

  std::string_view callee_of(PickleIndex index) const {
    const PickleValue& value = pickle_[index];
    return value.kind == Kind::kCall ? pickle_[value.items[0]].text : std::string_view();
  }

  bool is_tensor(PickleIndex index) const {
    const std::string_view callee = callee_of(index);
    return callee == kTensorV2 || callee == kTensorV1 || callee == kParameter;
  }

  // Values may be shared and may hold themselves: each dict is looked at once.
  std::optional<PickleIndex> find_dict(PickleIndex index, int depth) {
    if (pickle_[index].kind != Kind::kDict || depth > kMaxDictDepth || seen_[index]) {
      return std::nullopt;
    }
    seen_[index] = true;
    const std::vector<PickleIndex>& items = pickle_[index].items;
    for (const std::string_view wrapper : kWrapperKeys) {
      for (size_t i = 0; i < items.size(); i += 2) {
        if (text_of(items[i]) == wrapper) {
          if (const auto found = find_dict(items[i + 1], depth + 1)) {
            return found;
          }
        }
      }
    }
    for (size_t i = 0; i < items.size(); i += 2) {
      if (is_tensor(items[i + 1])) {
        return index;
      }
    }
    std::optional<PickleIndex> only;
    std::string_view only_key;
    for (size_t i = 0; i < items.size(); i += 2) {
      const auto found = find_dict(items[i + 1], depth + 1);
      if (found && only) {
        fail("holds dicts of tensors under " + in_quotes(only_key) + " and " +
             in_quotes(text_of(items[i])) +
             ", and no telling which is the model; save its state_dict() alone");
      }
      if (found) {
        only = found;
        only_key = text_of(items[i]);
      }
    }
    return only;
  }

  void refuse_converted(PickleIndex dict) const {
    const std::vector<PickleIndex>& items = pickle_[dict].items;
    if (pickle_[dict].kind != Kind::kDict) {
      return;
    }
    for (size_t i = 0; i < items.size(); i += 2) {
      if (text_of(items[i]) == "_strategy" || text_of(items[i]) == "_version") {
        fail("was converted by ChatRWKV (it holds " + in_quotes(text_of(items[i])) +
             "): its matrices are transposed, rescaled and may be quantised; use the file it was "
             "made from");
      }
    }
  }

  // `what` is "size" or "stride".
  std::vector<int64_t> to_sizes(PickleIndex index,
                                const std::string& owner,
                                const std::string& what) const {
    const PickleValue* value = &pickle_[index];
    if (callee_of(index) == kSize) {
      const PickleValue& arguments = pickle_[value->items[1]];
      value = arguments.items.size() == 1 ? &pickle_[arguments.items[0]] : nullptr;
    }
    if (value == nullptr || (value->kind != Kind::kTuple && value->kind != Kind::kList)) {
      fail("the " + what + "s of " + owner + " are " + shown(pickle_[index]) +
           ", expected a tuple of whole numbers; the file is damaged");
    }
    if (value->items.size() > kMaxRank) {
      fail(owner + " has " + std::to_string(value->items.size()) +
           " dimensions, expected at most " + std::to_string(kMaxRank));
    }
    std::vector<int64_t> sizes;
    for (const PickleIndex item : value->items) {
      sizes.push_back(to_integer(item, owner, what));
    }
    return sizes;
  }

  TensorReference to_tensor(PickleIndex index, std::string_view name) const {
    const std::string owner = "the tensor " + in_quotes(name);
    // A parameter holds its tensor as first argument; a parameter of a parameter does not occur.
    if (callee_of(index) == kParameter) {
      const PickleValue& arguments = pickle_[pickle_[index].items[1]];
      if (arguments.items.empty() || !is_tensor(arguments.items[0]) ||
          callee_of(arguments.items[0]) == kParameter) {
        fail("the parameter " + in_quotes(name) + " holds no tensor; the file is damaged");
      }
      index = arguments.items[0];
    }
    const std::vector<PickleIndex>& arguments = pickle_[pickle_[index].items[1]].items;
    if (arguments.size() < 4) {
      fail(owner + " has " + std::to_string(arguments.size()) +
           " arguments, expected storage, offset, sizes and strides; the file is damaged");
    }
    if (arguments.size() > 6) {
      refuse_marks(arguments[6], owner);
    }
    return {.name = std::string(name),
            .storage = to_storage(arguments[0], owner),
            .offset = to_integer(arguments[1], owner, "offset"),
            .shape = to_sizes(arguments[2], owner, "size"),
            .strides = to_sizes(arguments[3], owner, "stride")};
  }

  // A tensor may be marked as negated or conjugated: its values are not the bytes of its storage.
  void refuse_marks(PickleIndex metadata, const std::string& owner) const {
    if (pickle_[metadata].kind == Kind::kDict && !pickle_[metadata].items.empty()) {
      fail(owner + " carries marks (" + in_quotes(text_of(pickle_[metadata].items[0])) +
           ") that change its values; save tensor.clone() instead");
    }
  }

  static void take_off_prefixes(std::vector<TensorReference>& tensors) {
    const auto take_off = [&](std::string_view prefix) {
      const bool common = std::all_of(tensors.begin(), tensors.end(), [&](const auto& tensor) {
        return tensor.name.size() > prefix.size() && tensor.name.starts_with(prefix);
      });
      for (TensorReference& tensor : tensors) {
        tensor.name.erase(0, common ? prefix.size() : 0);
      }
      return common;
    };
    // Until none is left: they nest ("_forward_module.model.").
    while (std::any_of(std::begin(kPrefixes), std::end(kPrefixes), take_off)) {
    }
  }

  const Pickle& pickle_;
  const std::string& where_;
  std::vector<bool> seen_;
};

}  // namespace

std::span<const std::string_view> state_dict_globals() {
  return kGlobals;
}

std::vector<TensorReference> find_state_dict(const Pickle& pickle, const std::string& where) {
  return Reader(pickle, where).read();
}

std::vector<StorageReference> list_storages(const Pickle& pickle, const std::string& where) {
  const Reader reader(pickle, where);
  std::vector<StorageReference> storages;
  for (size_t i = 0; i < pickle.values.size(); ++i) {
    if (pickle.values[i].kind == Kind::kPersistent) {
      storages.push_back(reader.to_storage(static_cast<PickleIndex>(i), "a tensor"));
    }
  }
  return storages;
}

std::string write_state_dict(std::span<const TensorToWrite> tensors) {
  PickleWriter writer;
  const auto write_sizes = [&](std::span<const int64_t> sizes) {
    writer.mark();
    for (const int64_t size : sizes) {
      writer.integer(size);
    }
    writer.tuple();
  };
  const auto write_empty_dict = [&] {
    writer.global("collections", "OrderedDict");
    writer.empty_tuple();
    writer.call();
  };

  write_empty_dict();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const TensorToWrite& tensor = tensors[i];
    const auto storage_class = std::find_if(kStorageClasses.begin(),
                                            kStorageClasses.end(),
                                            [&](const auto& r) { return r.dtype == tensor.dtype; });
    writer.text(tensor.name);
    writer.global("torch._utils", "_rebuild_tensor_v2");
    writer.mark();
    {
      writer.mark();
      writer.text("storage");
      writer.global("torch", storage_class->global.substr(std::string_view("torch.").size()));
      writer.text(std::to_string(i));
      writer.text("cpu");
      writer.integer(static_cast<int64_t>(tensor.data.size()) / size_of(tensor.dtype));
      writer.tuple();
      writer.persistent();

      writer.integer(0);
      write_sizes(tensor.shape);
      write_sizes(contiguous_strides(tensor.shape));
      writer.boolean(false);
      write_empty_dict();
    }
    writer.tuple();
    writer.call();
    writer.set_item();
  }
  return writer.finish();
}

}  // namespace rwkv
