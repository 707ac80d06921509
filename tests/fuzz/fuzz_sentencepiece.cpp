// sentencepiece models: opened, and a text encoded and decoded.
#include "data/sentencepiece_tokenizer.h"
#include "tests/fuzz/fuzz_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed_tokenizer<rwkv::SentencepieceTokenizer>("a.model", data, size);
  return 0;
}
