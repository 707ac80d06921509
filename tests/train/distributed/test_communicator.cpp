#include <thread>
#include <vector>

#include <ATen/ATen.h>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/ranks.h"
#include "tests/support/test_data.h"
#include "train/distributed/communicator.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

at::Tensor counted_from(int64_t first, int64_t count) {
  return at::arange(first, first + count, at::kFloat);
}

TEST(Communicator, GivesEachItsPartOfTheSum) {
  test::on_ranks(3, [](Communicator& all) {
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
  test::on_ranks(3, [](Communicator& all) {
    const int64_t rank = all.rank();
    const at::Tensor whole = at::zeros({12}, at::kBFloat16);
    const at::Tensor own = whole.slice(0, 4 * rank, 4 * rank + 4);
    own.copy_(counted_from(4 * rank, 4));
    all.begin_all_gather(own, whole, "a test")->wait();
    EXPECT_TRUE(whole.equal(counted_from(0, 12).to(at::kBFloat16))) << rank << ": " << whole;
  });
}

TEST(Communicator, AddsInTheOrderOfRanks) {
  test::on_ranks(4, [](Communicator& all) {
    std::vector<at::Tensor> wholes;
    for (int64_t rank = 0; rank < all.world_size(); ++rank) {
      at::manual_seed(static_cast<uint64_t>(rank));
      wholes.push_back(at::randn({4, 50'000}));
    }
    const at::Tensor expected = ((wholes[0] + wholes[1]) + wholes[2]) + wholes[3];
    const at::Tensor own = wholes[static_cast<size_t>(all.rank())][all.rank()];
    all.begin_reduce_scatter(wholes[static_cast<size_t>(all.rank())], own, "a test")->wait();
    EXPECT_TRUE(own.equal(expected[all.rank()])) << all.rank();
  });
}

TEST(Communicator, KeepsOperationsUnderWayApart) {
  test::on_ranks(3, [](Communicator& all) {
    const int64_t rank = all.rank();
    const at::Tensor first = counted_from(rank, 300'000);
    const at::Tensor second = counted_from(rank, 30);
    const at::Tensor first_part = at::empty({100'000});
    const at::Tensor second_part = at::empty({10});
    const at::Tensor gathered = at::empty({300});
    const auto adding = all.begin_reduce_scatter(first, first_part, "a test");
    const auto adding_too = all.begin_reduce_scatter(second, second_part, "a test");
    const auto gathering = all.begin_all_gather(counted_from(100 * rank, 100), gathered, "a test");
    gathering->wait();
    adding_too->wait();
    adding->wait();
    EXPECT_TRUE(first_part.equal(3 * counted_from(100'000 * rank, 100'000) + 3)) << rank;
    EXPECT_TRUE(second_part.equal(3 * counted_from(10 * rank, 10) + 3)) << rank;
    EXPECT_TRUE(gathered.equal(counted_from(0, 300))) << rank;
  });
}

TEST(Communicator, TellsTheValuesOfAllByRank) {
  test::on_ranks(3, [](Communicator& all) {
    EXPECT_THAT(all.values_of_all((all.rank() - 1) * (int64_t{1} << 60), "a test"),
                ElementsAre(-(int64_t{1} << 60), 0, int64_t{1} << 60));
  });
}

TEST(Communicator, HandsNotesFromThreadToThread) {
  test::on_ranks(2, [](Communicator& all) {
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
  test::on_ranks(2, [](Communicator& all) {
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
