#include "model/version_registry.h"

#include <array>
#include <stdexcept>

#include "model/rwkv4.h"

namespace rwkv {
namespace {

const std::array kVersions = {rwkv4_version()};

std::string known_names() {
  std::string names;
  for (const ModelVersion& version : kVersions) {
    names.append(names.empty() ? "" : ", ").append(version.name);
  }
  return names;
}

}  // namespace

const ModelVersion& find_version(std::string_view name) {
  for (const ModelVersion& version : kVersions) {
    if (version.name == name) {
      return version;
    }
  }
  throw std::invalid_argument("model.version = \"" + std::string(name) +
                              "\": no such version; known are " + known_names());
}

const ModelVersion& recognise_version(const TensorShapes& shapes) {
  for (const ModelVersion& version : kVersions) {
    if (version.recognises(shapes)) {
      return version;
    }
  }
  throw std::runtime_error("holds " + std::to_string(shapes.size()) +
                           " tensors of no RWKV version known here; known are " + known_names());
}

}  // namespace rwkv
