#include "train/distributed/placement.h"

#include <cstdlib>

namespace rwkv {

Placement placement_from_environment() {
  Placement placement;
  if (const char* rank = std::getenv("RANK")) {
    placement.rank = std::atoll(rank);
    placement.world_size = std::atoll(std::getenv("WORLD_SIZE"));
    placement.local_rank = std::atoll(std::getenv("LOCAL_RANK"));
    placement.local_size = std::atoll(std::getenv("LOCAL_WORLD_SIZE"));
    placement.master_host = std::getenv("MASTER_ADDR");
    placement.master_port = std::atoll(std::getenv("MASTER_PORT"));
  }
  return placement;
}

}  // namespace rwkv
