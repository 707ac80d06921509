#pragma once

#include <cstdint>
#include <string>

namespace rwkv {

// Where this process stands among those that train together.
struct Placement {
  int64_t rank = 0, world_size = 1, local_rank = 0, local_size = 1;
  std::string master_host;
  int64_t master_port = 0;
  bool launcher_has_store = false;
  std::string source;
};

Placement placement_from_environment();

}  // namespace rwkv
