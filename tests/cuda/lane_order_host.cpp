#include "tests/cuda/lane_order.h"
#include "tests/support/host_device.h"

namespace rwkv::test {

void set_lane_order(uint64_t seed) {
  host_device::set_lane_order(seed);
}

}  // namespace rwkv::test
