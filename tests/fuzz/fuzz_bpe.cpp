// Hugging Face tokenizers files such as 20B_tokenizer.json: opened, and a text encoded and decoded.
#include "data/bpe_tokenizer.h"
#include "tests/fuzz/fuzz_tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::fuzz::feed_tokenizer<rwkv::BpeTokenizer>("tokenizer.json", data, size);
  return 0;
}
