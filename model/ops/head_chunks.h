// In which pieces head_loss makes its logits (model/ops/head_loss.h). No Torch here: a run's memory
// is planned without it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rwkv::ops {

// Chunks save memory and cost time, for each adds its dW to the sum. 512 rows of 50,277 logits in
// two chunks instead of one take 1.05 to 1.1 times as long on a CPU in fp32, 1.4 in bf16; on an
// H100 dW of 16,384 rows in four takes 1.85 ms instead of 1.57.
inline constexpr int64_t kChunkBytes = int64_t{512} << 20;
// Columns, and rows of a chunk, of which tensor cores make tiles without a remainder.
inline constexpr int64_t kCudaMultiple = 64;

inline int64_t ceil_div(int64_t x, int64_t y) {
  return (x + y - 1) / y;
}

inline int64_t round_up(int64_t x, int64_t multiple) {
  return ceil_div(x, multiple) * multiple;
}

// The most rows that fit into kChunkBytes, in chunks of equal size; the last may have fewer.
inline int64_t choose_rows_per_chunk(int64_t rows, int64_t row_bytes) {
  const int64_t most = std::max(kChunkBytes / row_bytes / kCudaMultiple, int64_t{1});
  const int64_t chunks = ceil_div(rows, most * kCudaMultiple);
  return round_up(ceil_div(rows, chunks), kCudaMultiple);
}

}  // namespace rwkv::ops
