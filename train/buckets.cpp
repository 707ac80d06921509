#include "train/buckets.h"

#include <algorithm>

namespace rwkv {

int64_t padded_for(int64_t elements, const Sharding& sharding) {
  const int64_t unit = kBufferAlignment * sharding.num_processes;
  return (elements + unit - 1) / unit * unit;
}

std::vector<Bucket> cut_into_buckets(
    size_t store, int64_t begin, int64_t end, int64_t element_size, const Sharding& sharding) {
  const int64_t parts = sharding.num_processes;
  const int64_t step =
      parts == 1 ? end - begin : padded_for(sharding.bucket_bytes / element_size, sharding);
  std::vector<Bucket> buckets;
  for (int64_t at = begin; at < end; at += step) {
    const int64_t stop = std::min(at + step, end);
    const int64_t part = (stop - at) / parts;
    const int64_t own = at + sharding.rank * part;
    buckets.push_back({.store = store,
                       .begin = at,
                       .end = stop,
                       .own_begin = own,
                       .own_end = own + part,
                       .shard_begin = at / parts});
  }
  return buckets;
}

}  // namespace rwkv
