#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <system_error>

#include <spdlog/spdlog.h>

#include "data/binidx.h"
#include "data/text_reader.h"
#include "data/tokenize_corpus.h"
#include "data/tokenizer_registry.h"
#include "train/commands/commands.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery tokenize --tokenizer world --output corpus a.jsonl.zst b.txt";

void make_folder_of(const std::string& prefix) {
  const std::filesystem::path folder = std::filesystem::path(prefix).parent_path();
  std::error_code error;
  if (!folder.empty() && !std::filesystem::create_directories(folder, error) && error) {
    throw std::runtime_error("--output " + prefix +
                             ": its folder cannot be made: " + error.message() + "; name another");
  }
}

}  // namespace

int tokenize_command(int argc, char** argv) {
  cxxopts::Options options(
      "rookery tokenize",
      "Turns text (.txt: one document a file; .jsonl: one a row; each also .gz or .zst) into the\n"
      "token files PREFIX.bin and PREFIX.idx.\n\nTokenizers:\n" +
          describe_tokenizer_specs());
  cxxopts::OptionAdder add = options.add_options();
  add("tokenizer", "see above", cxxopts::value<std::string>());
  add("output",
      "PREFIX of the files to write; its folder is made if it is not there",
      cxxopts::value<std::string>());
  add("jsonl-key",
      "key of the text in .jsonl rows",
      cxxopts::value<std::string>()->default_value("text"));
  add("files", "text files", cxxopts::value<std::vector<std::string>>());
  options.parse_positional({"files"});
  options.positional_help("FILE...");
  const auto parsed =
      parse_options(options, argc, argv, kExample, {"tokenizer", "output", "files"});
  if (!parsed) {
    return 0;
  }
  const auto tokenizer = open_tokenizer((*parsed)["tokenizer"].as<std::string>());
  TextReader reader((*parsed)["files"].as<std::vector<std::string>>(),
                    {.jsonl_key = (*parsed)["jsonl-key"].as<std::string>()});
  const std::string prefix = (*parsed)["output"].as<std::string>();
  make_folder_of(prefix);
  BinidxWriter writer(prefix,
                      {.identity = tokenizer->identity(),
                       .vocab_size = tokenizer->vocab_size(),
                       .end_of_document = tokenizer->end_of_document()});
  const TokenizeResult result = tokenize_corpus(reader, *tokenizer, writer);
  std::cout << prefix << ": " << result.documents << " documents, " << result.tokens << " tokens, "
            << result.text_bytes << " bytes of text\n";
  return 0;
}

}  // namespace rwkv
