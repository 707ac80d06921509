// Timings of the tokenizers.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "data/text_reader.h"
#include "train/bench/bench.h"

namespace rwkv {

// Encodes every document on one thread, one after the other. `spec` as in
// data/tokenizer_registry.h. Figures: mb_per_s (10^6 bytes of text), tokens, load_ms (median of
// opening the tokenizer, as often as the text is encoded). Throws what open_tokenizer() throws.
BenchRow bench_tokenizer(const std::string& spec,
                         std::span<const std::string> documents,
                         int64_t repeats);

// All documents of text files, in memory.
std::vector<std::string> read_documents(TextReader& reader);

// Documents of 4,000 bytes that look like English at a glance: invented words of common syllables,
// the frequent ones short, with punctuation, capitals and numbers; the same on every call. No real
// text: real words make longer tokens, so real text encodes at another rate.
std::vector<std::string> invented_documents(int64_t total_bytes);

}  // namespace rwkv
