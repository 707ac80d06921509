// Runs the tokenizers for tests that are not written in C++ (tests/python).
//   encode_ids encode SPEC TEXT IDS [PART_BYTES]  ids of a file as little-endian uint16; with
//                                                 PART_BYTES, through encode_part in such pieces
//   encode_ids train TEXT MODEL VOCAB_SIZE KIND   a sentencepiece model; KIND is unigram or bpe
// Prints the speed of encoding in MB (10^6 bytes) a second of processor time.
#include <algorithm>
#include <ctime>
#include <iostream>

#include "data/atomic_file.h"
#include "data/sentencepiece_training.h"
#include "data/tokenizer_registry.h"
#include "tests/support/encode_in_parts.h"

namespace {

double processor_seconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void encode(const std::vector<std::string>& arguments) {
  const auto tokenizer = rwkv::open_tokenizer(arguments.at(1));
  const std::string text = rwkv::read_text_file(arguments.at(2));
  const double start = processor_seconds();
  const std::vector<int32_t> ids =
      arguments.size() == 5
          ? rwkv::test::encode_in_parts(*tokenizer, text, std::stoul(arguments[4]))
          : tokenizer->encode(text);
  const double seconds = processor_seconds() - start;
  std::cout << text.size() << " bytes, " << ids.size() << " tokens, "
            << static_cast<double>(text.size()) / 1e6 / seconds << " MB/s\n";
  std::string bytes;
  for (const int32_t id : ids) {
    if (id > 0xFFFF) {
      throw std::runtime_error("id " + std::to_string(id) + " does not fit uint16");
    }
    bytes += static_cast<char>(id & 0xFF);
    bytes += static_cast<char>(id >> 8);
  }
  rwkv::AtomicFile file(arguments.at(3));
  file.write(bytes);
  file.commit();
}

void train(const std::vector<std::string>& arguments) {
  rwkv::train_sentencepiece({.text_files = {arguments.at(1)},
                             .model_path = arguments.at(2),
                             .vocab_size = std::stol(arguments.at(3)),
                             .kind = arguments.at(4) == "bpe" ? rwkv::SentencepieceKind::kBpe
                                                              : rwkv::SentencepieceKind::kUnigram});
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  try {
    arguments.at(0) == "train" ? train(arguments) : encode(arguments);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}
