// rookery <command>: finds the command and runs it.
#include <iostream>
#include <stdexcept>
#include <string_view>

#include "train/commands/commands.h"
#include "train/run_main.h"

namespace {

struct Command {
  std::string_view name;
  std::string_view summary;
  int (*run)(int argc, char** argv);
};

constexpr Command kCommands[] = {
    {"tokenizer", "train a sentencepiece tokenizer on text", &rwkv::tokenizer_command},
    {"tokenize", "turn text into token files", &rwkv::tokenize_command},
    {"train", "train a model, or go on with a run", &rwkv::train_command},
    {"eval", "loss of a model on a corpus", &rwkv::eval_command},
    {"generate", "continue a prompt", &rwkv::generate_command},
    {"logits", "a model's logits for given tokens", &rwkv::logits_command},
    {"convert", "between .pth and .safetensors", &rwkv::convert_command},
};

void print_help() {
  std::cout << "rookery " << ROOKERY_VERSION << ": train RWKV language models\n\n"
            << "Usage:\n  rookery COMMAND [OPTION...]\n\nCommands:\n";
  for (const Command& command : kCommands) {
    std::cout << "  " << command.name << std::string(12 - command.name.size(), ' ')
              << command.summary << '\n';
  }
  std::cout << "\nEach command has --help, with an example:\n  rookery train --help\n";
}

int dispatch(int argc, char** argv) {
  const std::string_view name = argc > 1 ? argv[1] : "--help";
  if (name == "--help" || name == "-h" || name == "help") {
    print_help();
    return 0;
  }
  if (name == "--version") {
    std::cout << "rookery " << ROOKERY_VERSION << '\n';
    return 0;
  }
  for (const Command& command : kCommands) {
    if (command.name == name) {
      return command.run(argc - 1, argv + 1);
    }
  }
  throw std::invalid_argument("there is no command \"" + std::string(name) +
                              "\"; rookery --help lists them");
}

}  // namespace

int main(int argc, char** argv) {
  return rwkv::run_main([&] { return dispatch(argc, argv); });
}
