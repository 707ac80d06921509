// Several processes of a test, each with a communicator.
#pragma once

#include <cstdint>
#include <functional>

#include "train/distributed/communicator.h"

namespace rwkv::test {

// A port that nobody listens at.
int64_t free_port();
// Runs `work` in as many processes; what fails in one of them is a failure of the test. Processes,
// not threads: c10d keeps a record of operations that two groups must not write at a time.
void on_ranks(int64_t count, const std::function<void(Communicator&)>& work);

}  // namespace rwkv::test
