#include "model/version_registry.h"

#include <array>

#include "model/rwkv4.h"
#include "model/rwkv5.h"
#include "model/rwkv6.h"
#include "model/rwkv7.h"
#include "model/version_shapes.h"

namespace rwkv {
namespace {

const std::array kVersions = {rwkv4_version(), rwkv5_version(), rwkv6_version(), rwkv7_version()};

}  // namespace

const ModelVersion& find_version(std::string_view name) {
  for (const ModelVersion& version : kVersions) {
    if (version.name == name) {
      return version;
    }
  }
  // Every version that can be told from a file can be made: this one throws.
  find_version_shapes(name);
  TORCH_CHECK(false, "version ", name, " has a row of shapes but none that makes its model");
}

}  // namespace rwkv
