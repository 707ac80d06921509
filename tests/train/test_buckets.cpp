#include <gtest/gtest.h>

#include "train/buckets.h"

namespace rwkv {
namespace {

TEST(Buckets, OfOneProcessAreTheBufferAsItIs) {
  const std::vector<Bucket> buckets = cut_into_buckets(1, 0, 1 << 20, 4, {.bucket_bytes = 4096});
  ASSERT_EQ(buckets.size(), 1u);
  EXPECT_EQ(buckets[0].store, 1u);
  EXPECT_EQ(buckets[0].own_begin, 0);
  EXPECT_EQ(buckets[0].own_end, 1 << 20);
  EXPECT_EQ(padded_for(48, {}), 48);
  EXPECT_TRUE(cut_into_buckets(0, 16, 16, 4, {}).empty());
}

// Every element has one owner, whose shard has a place for it; parts of a bucket are equal.
TEST(Buckets, GiveEachElementToOneProcess) {
  for (const int64_t processes : {2, 3, 7, 8}) {
    const Sharding any{.num_processes = processes, .bucket_bytes = 4000};
    const int64_t trained = padded_for(10'000, any);
    const int64_t end = trained + padded_for(1, any);
    std::vector<int> owners(static_cast<size_t>(end));
    for (int64_t rank = 0; rank < processes; ++rank) {
      Sharding sharding = any;
      sharding.rank = rank;
      std::vector<Bucket> buckets = cut_into_buckets(0, 0, trained, 4, sharding);
      EXPECT_GT(buckets.size(), 2u);
      const std::vector<Bucket> frozen = cut_into_buckets(0, trained, end, 4, sharding);
      buckets.insert(buckets.end(), frozen.begin(), frozen.end());
      int64_t next = 0, shard_end = 0;
      for (const Bucket& bucket : buckets) {
        EXPECT_EQ(bucket.begin, next);
        EXPECT_EQ(bucket.shard_begin, shard_end);
        EXPECT_EQ(bucket.own_size() * processes, bucket.size());
        EXPECT_EQ(bucket.own_begin % kBufferAlignment, 0);
        for (int64_t i = bucket.own_begin; i < bucket.own_end; ++i) {
          ++owners[static_cast<size_t>(i)];
        }
        next = bucket.end;
        shard_end += bucket.own_size();
      }
      EXPECT_EQ(next, end);
      EXPECT_EQ(shard_end * processes, end);
    }
    EXPECT_EQ(owners, std::vector<int>(owners.size(), 1));
  }
}

}  // namespace
}  // namespace rwkv
