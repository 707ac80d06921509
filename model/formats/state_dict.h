// A PyTorch state dict as a pickle describes it: tensors by name, each a view of a storage.
//
// Grammar of a tensor, where (...) is a tuple:
//   tensor  = _rebuild_tensor_v2(storage, offset, sizes, strides, requires_grad, hooks[, metadata])
//           | _rebuild_tensor(storage, offset, sizes, strides)
//           | _rebuild_parameter(tensor, requires_grad, hooks)
//   storage = persistent id ("storage", class, key, location, numel[, view])
//   view    = None | (key, offset, numel): a part of the storage, in the legacy container alone
// Source: PyTorch torch/_utils.py and torch/serialization.py.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/formats/pickle.h"
#include "model/formats/weight_file.h"

namespace rwkv {

// Numbers are as the file has them: nothing here has been compared with the storages' bytes.
struct StorageReference {
  std::string_view key;  // points into the pickle
  WeightDtype dtype = WeightDtype::kF32;
  int64_t num_elements = 0;
  // The part of the storage that is meant, in elements; absent: the whole.
  struct View {
    int64_t offset = 0;
    int64_t num_elements = 0;
  };
  std::optional<View> view;
};

struct TensorReference {
  std::string name;
  StorageReference storage;
  int64_t offset = 0;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
};

// The globals that a state dict needs, for read_pickle.
std::span<const std::string_view> state_dict_globals();

// Finds the one dict that holds tensors: the root or a dict under it, and of several the one under
// a usual name ("state_dict", "model", "module", ...). Prefixes common to all names are taken off.
// Throws std::runtime_error, starting with `where`, if there is none or no telling which, for a
// tensor that does not fit the grammar, and for the marks of ChatRWKV-converted files.
std::vector<TensorReference> find_state_dict(const Pickle& pickle, const std::string& where);

// Every storage that the pickle refers to, once for each reference.
std::vector<StorageReference> list_storages(const Pickle& pickle, const std::string& where);

// The pickle of an OrderedDict of these tensors; the storage key of the i-th is "i".
std::string write_state_dict(std::span<const TensorToWrite> tensors);

}  // namespace rwkv
