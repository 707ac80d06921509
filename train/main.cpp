// rookery <command>: finds the command and runs it.
#include <algorithm>
#include <iostream>
#include <stdexcept>
#include <string_view>

#include "train/commands/commands.h"
#include "train/commands/launch.h"
#include "train/run_main.h"
#include "train/torch_library.h"
#include "train/version.h"

namespace {

struct Command {
  std::string_view name;
  std::string_view summary;
  int (*run)(int argc, char** argv);  // none: it needs LibTorch, and lies in its library
};

constexpr auto kNeedsTorch = nullptr;
constexpr std::string_view kVerbose = "--verbose";

constexpr Command kCommands[] = {
    {"tokenizer", "train a sentencepiece tokenizer on text", &rwkv::tokenizer_command},
    {"tokenize", "turn text into token files", &rwkv::tokenize_command},
    {"train", "train a model, or go on with a run", kNeedsTorch},
    {"eval", "loss of a model on a corpus", kNeedsTorch},
    {"generate", "continue a prompt", kNeedsTorch},
    {"logits", "a model's logits for given tokens", kNeedsTorch},
    {"bench", "time a training step, decoding, single ops", kNeedsTorch},
    {"convert", "between .pth and .safetensors", &rwkv::convert_command},
    {"inspect", "what is in a model, run, corpus or tokenizer", &rwkv::inspect_command},
    {"report", "a page with a run's curves, or comparing runs", &rwkv::report_command},
    {"plan", "the memory and speed of a run, before there is one", &rwkv::plan_command},
    {"doctor", "can this machine train, and how well", &rwkv::doctor_command},
};

void print_help() {
  std::cout << "rookery " << rwkv::rookery_version() << ": train RWKV language models\n\n"
            << "Usage:\n  rookery COMMAND [OPTION...]\n\nCommands:\n";
  for (const Command& command : kCommands) {
    std::cout << "  " << command.name << std::string(12 - command.name.size(), ' ')
              << command.summary << '\n';
  }
  std::cout << "\nEach command has --help, with an example:\n  rookery train --help\n\n"
            << "--verbose, with any command, adds the place in the program to the text of a bug.\n";
}

// Takes --verbose, which every command has, out of the arguments.
bool take_verbose(int& argc, char** argv) {
  char** const end = std::remove_if(
      argv + 1, argv + argc, [](const char* argument) { return argument == kVerbose; });
  const bool found = end != argv + argc;
  argc = static_cast<int>(end - argv);
  return found;
}

int dispatch(int argc, char** argv) {
  const bool verbose = take_verbose(argc, argv);
  const std::string_view name = argc > 1 ? argv[1] : "--help";
  if (name == "--help" || name == "-h" || name == "help") {
    print_help();
    return 0;
  }
  if (name == "--version") {
    std::cout << "rookery " << rwkv::rookery_version() << '\n';
    return 0;
  }
  if (name == "train") {
    // The launcher of several ranks outlives them all, and needs no LibTorch.
    if (const auto code = rwkv::launch_command(argc - 1, argv + 1, verbose)) {
      return *code;
    }
  }
  if (name == "doctor") {
    if (const auto code = rwkv::doctor_distributed_command(argc - 1, argv + 1, verbose)) {
      return *code;
    }
  }
  for (const Command& command : kCommands) {
    if (command.name == name) {
      return command.run == kNeedsTorch
                 ? rwkv::run_torch_command(command.name.data(), argc - 1, argv + 1, verbose)
                 : command.run(argc - 1, argv + 1);
    }
  }
  throw std::invalid_argument("there is no command \"" + std::string(name) +
                              "\"; rookery --help lists them");
}

}  // namespace

int main(int argc, char** argv) {
  return rwkv::run_main([&] { return dispatch(argc, argv); });
}
