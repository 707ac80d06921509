#include <cstdio>
#include <functional>
#include <thread>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "tests/support/test_data.h"
#include "train/distributed/communicator.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

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

// Runs `work` in as many processes, each with its communicator: c10d keeps a record of operations
// that two groups of one process must not write at a time.
void on_ranks(int64_t count, const std::function<void(Communicator&)>& work) {
  const int64_t port = free_port();
  std::vector<pid_t> children;
  for (int64_t rank = 0; rank < count; ++rank) {
    children.push_back(fork());
    ASSERT_GE(children.back(), 0);
    if (children.back() != 0) {
      continue;
    }
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

at::Tensor counted_from(int64_t first, int64_t count) {
  return at::arange(first, first + count, at::kFloat);
}

TEST(Communicator, GivesEachItsPartOfTheSum) {
  on_ranks(3, [](Communicator& all) {
    const int64_t rank = all.rank();
    const at::Tensor whole = counted_from(100 * rank, 12);
    const at::Tensor part = at::empty({4});
    all.begin_reduce_scatter(whole, part, "a test")->wait();
    EXPECT_TRUE(part.equal(3 * counted_from(4 * rank, 4) + 300)) << rank << ": " << part;
    // Where it lies already.
    const at::Tensor own = whole.slice(0, 4 * rank, 4 * rank + 4);
    all.begin_reduce_scatter(whole, own, "a test")->wait();
    EXPECT_TRUE(own.equal(part)) << rank << ": " << own;
  });
}

TEST(Communicator, PutsThePartsOfAllTogether) {
  on_ranks(3, [](Communicator& all) {
    const int64_t rank = all.rank();
    const at::Tensor whole = at::zeros({12}, at::kBFloat16);
    const at::Tensor own = whole.slice(0, 4 * rank, 4 * rank + 4);
    own.copy_(counted_from(4 * rank, 4));
    all.begin_all_gather(own, whole, "a test")->wait();
    EXPECT_TRUE(whole.equal(counted_from(0, 12).to(at::kBFloat16))) << rank << ": " << whole;
  });
}

TEST(Communicator, TellsTheValuesOfAllByRank) {
  on_ranks(3, [](Communicator& all) {
    EXPECT_THAT(all.values_of_all((all.rank() - 1) * (int64_t{1} << 60), "a test"),
                ElementsAre(-(int64_t{1} << 60), 0, int64_t{1} << 60));
  });
}

TEST(Communicator, HandsNotesFromThreadToThread) {
  on_ranks(2, [](Communicator& all) {
    std::thread other([&] {
      if (all.rank() == 0) {
        all.leave_note("save", "begun");
      } else {
        EXPECT_EQ(all.read_note("save", "the begin of a save"), "begun");
      }
    });
    // Operations go on meanwhile.
    all.barrier("a test");
    other.join();
    all.barrier("a test");
    if (all.rank() == 1) {
      all.remove_note("save");
      all.leave_note("save", "again");
    }
    all.barrier("a test");
    EXPECT_EQ(all.read_note("save", "the next save"), "again");
    all.barrier("a test");
  });
}

TEST(Communicator, WaitsForNoNoteOfOneThatFails) {
  on_ranks(2, [](Communicator& all) {
    if (all.rank() == 0) {
      all.announce_failure("the disk is full");
    } else {
      EXPECT_THAT(THROWN_TEXT(DistributedError, all.read_note("never", "the end of a save")),
                  AllOf(HasSubstr("the end of a save failed on rank 1"),
                        HasSubstr("rank 0 ended: the disk is full")));
    }
    all.barrier("a test");
  });
}

}  // namespace
}  // namespace rwkv
