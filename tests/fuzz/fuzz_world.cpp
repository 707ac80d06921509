// World vocabularies: opened, and a text encoded and decoded.
#include "data/world_tokenizer.h"
#include "tests/fuzz/fuzz_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed_tokenizer<rwkv::WorldTokenizer>("vocab.txt", data, size);
  return 0;
}
