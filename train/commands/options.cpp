#include <iostream>
#include <stdexcept>

#include "train/commands/commands.h"

namespace rwkv {

std::optional<cxxopts::ParseResult> parse_options(cxxopts::Options& options,
                                                  int argc,
                                                  char** argv,
                                                  const std::string& example,
                                                  const std::vector<std::string>& required) {
  options.add_options()("h,help", "show this");
  cxxopts::ParseResult result = options.parse(argc, argv);
  if (result.count("help") > 0) {
    std::cout << options.help() << "\nExample:\n  " << example << '\n';
    return std::nullopt;
  }
  if (!result.unmatched().empty()) {
    throw std::invalid_argument(options.program() + ": unexpected \"" + result.unmatched().front() +
                                "\"; --help lists the options");
  }
  for (const std::string& name : required) {
    if (result.count(name) == 0) {
      throw std::invalid_argument(options.program() + ": --" + name +
                                  " is not given; for example: " + example);
    }
  }
  return result;
}

ComputeDtype parse_dtype(const std::string& name) {
  if (name == "fp32") {
    return ComputeDtype::kFp32;
  }
  if (name == "bf16") {
    return ComputeDtype::kBf16;
  }
  throw std::invalid_argument("--dtype " + name + ": expected fp32 or bf16");
}

}  // namespace rwkv
