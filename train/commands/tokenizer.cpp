#include <iostream>
#include <stdexcept>

#include "data/sentencepiece_training.h"
#include "train/commands/commands.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery tokenizer train --input corpus.txt --output corpus.model --vocab-size 4096";

int train_tokenizer(int argc, char** argv) {
  const SentencepieceTraining defaults;
  cxxopts::Options options(
      "rookery tokenizer train",
      "Trains a sentencepiece tokenizer on text: .txt or .jsonl, each also .gz "
      "or .zst.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("input", "a text file; may be given again", cxxopts::value<std::vector<std::string>>());
  add("output", "the model file to write", cxxopts::value<std::string>());
  add("vocab-size",
      "number of tokens",
      cxxopts::value<int64_t>()->default_value(std::to_string(defaults.vocab_size)));
  add("kind", "unigram or bpe", cxxopts::value<std::string>()->default_value("unigram"));
  add("max-lines",
      "lines sampled from a longer corpus",
      cxxopts::value<int64_t>()->default_value(std::to_string(defaults.max_lines)));
  add("jsonl-key",
      "key of the text in .jsonl rows",
      cxxopts::value<std::string>()->default_value(defaults.jsonl_key));
  const auto parsed = parse_options(options, argc, argv, kExample, {"input", "output"});
  if (!parsed) {
    return 0;
  }
  const std::string kind = (*parsed)["kind"].as<std::string>();
  if (kind != "unigram" && kind != "bpe") {
    throw std::invalid_argument("--kind " + kind + ": expected unigram or bpe");
  }
  train_sentencepiece(
      {.text_files = (*parsed)["input"].as<std::vector<std::string>>(),
       .jsonl_key = (*parsed)["jsonl-key"].as<std::string>(),
       .model_path = (*parsed)["output"].as<std::string>(),
       .vocab_size = (*parsed)["vocab-size"].as<int64_t>(),
       .kind = kind == "bpe" ? SentencepieceKind::kBpe : SentencepieceKind::kUnigram,
       .max_lines = (*parsed)["max-lines"].as<int64_t>()});
  std::cout << (*parsed)["output"].as<std::string>() << '\n';
  return 0;
}

}  // namespace

int tokenizer_command(int argc, char** argv) {
  const std::string verb = argc > 1 ? argv[1] : "--help";
  if (verb == "train") {
    return train_tokenizer(argc - 1, argv + 1);
  }
  if (verb == "--help" || verb == "-h") {
    std::cout << "Usage:\n  rookery tokenizer train [OPTION...]\n\nExample:\n  " << kExample
              << '\n';
    return 0;
  }
  throw std::invalid_argument("rookery tokenizer: there is no \"" + verb +
                              "\", only \"train\"; for example: " + kExample);
}

}  // namespace rwkv
