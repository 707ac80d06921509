// How the flat buffers of an optimizer are cut among processes. No Torch.
//
// A buffer is cut into buckets, and each bucket into as many equal parts as there are processes:
// part r is process r's own. So every bucket can be reduced, updated and gathered by itself, with
// the same work for all. Parameters lie across these cuts as they come: nothing has to divide.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rwkv {

struct Sharding {
  int64_t rank = 0;
  int64_t num_processes = 1;
  // ZeRO (arXiv:1910.02054): 0: each process has all; 1: own parts alone of moments and masters;
  // 2: of reduced gradients, too.
  int64_t zero_stage = 0;
  // Of a gradient's elements. See train/distributed/data_parallel.h.
  int64_t bucket_bytes = int64_t{100} << 20;
};

// Parameters, and the parts of buckets, begin at multiples of as many elements: in fp32 on a cache
// line of their own, as a tensor that is allocated alone.
inline constexpr int64_t kBufferAlignment = 16;

// A size that divides among the processes.
int64_t padded_for(int64_t elements, const Sharding& sharding);

// Elements [begin, end) of a buffer; [own_begin, own_end) is this process's part of them, and
// begins at shard_begin where a buffer has own parts alone.
struct Bucket {
  size_t store = 0;  // which buffer
  int64_t begin = 0;
  int64_t end = 0;
  int64_t own_begin = 0;
  int64_t own_end = 0;
  int64_t shard_begin = 0;
  int64_t size() const { return end - begin; }
  int64_t own_size() const { return own_end - own_begin; }
};

// Cuts elements [begin, end), both padded_for() the sharding. The buckets of one process are not
// cut further: they are one, or none.
std::vector<Bucket> cut_into_buckets(
    size_t store, int64_t begin, int64_t end, int64_t element_size, const Sharding& sharding);

}  // namespace rwkv
