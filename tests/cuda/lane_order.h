// The order in which a kernel's lanes take turns: a choice of the host runner, none of a GPU's
// user.
#pragma once

#include <cstdint>

namespace rwkv::test {

// 0: that of their numbers; any other: shuffled. On a GPU, nothing changes.
void set_lane_order(uint64_t seed);

}  // namespace rwkv::test
