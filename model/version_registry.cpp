#include "model/version_registry.h"

#include <array>
#include <stdexcept>

#include "model/rwkv4.h"

namespace rwkv {
namespace {

const std::array kVersions = {rwkv4_version()};

}  // namespace

const ModelVersion& find_version(std::string_view name) {
  std::string known;
  for (const ModelVersion& version : kVersions) {
    if (version.name == name) {
      return version;
    }
    known += (known.empty() ? "" : ", ") + std::string(version.name);
  }
  throw std::invalid_argument("model.version = \"" + std::string(name) +
                              "\": no such version; known are " + known);
}

const ModelVersion& recognise_version(const TensorShapes& shapes) {
  for (const ModelVersion& version : kVersions) {
    if (version.recognises(shapes)) {
      return version;
    }
  }
  throw std::runtime_error("holds " + std::to_string(shapes.size()) +
                           " tensors of no RWKV version known here (looked for emb.weight, "
                           "blocks.0.att.time_decay, ...)");
}

}  // namespace rwkv
