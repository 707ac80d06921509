#include "tests/support/ranks.h"

#include <cstdio>
#include <exception>
#include <vector>

#include <ATen/Parallel.h>

#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace rwkv::test {

int64_t free_port() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(fd);
  return ntohs(address.sin_port);
}

void on_ranks(int64_t count, const std::function<void(Communicator&)>& work) {
  const int64_t port = free_port();
  std::vector<pid_t> children;
  for (int64_t rank = 0; rank < count; ++rank) {
    children.push_back(fork());
    ASSERT_GE(children.back(), 0);
    if (children.back() != 0) {
      continue;
    }
    at::set_num_threads(1);
    try {
      Placement placement;
      placement.rank = placement.local_rank = rank;
      placement.world_size = placement.local_size = count;
      placement.master_host = "127.0.0.1";
      placement.master_port = port;
      Communicator communicator(placement, OpenDevice{}, std::chrono::seconds(20));
      work(communicator);
    } catch (const std::exception& error) {
      ADD_FAILURE() << "rank " << rank << ": " << error.what();
    }
    std::fflush(stdout);
    _exit(testing::Test::HasFailure() ? 1 : 0);
  }
  for (const pid_t child : children) {
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0) << "one of the processes failed";
  }
}

}  // namespace rwkv::test
