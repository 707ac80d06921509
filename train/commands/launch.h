// `rookery train` as the launcher of several ranks (train/distributed/launcher.h): in the program
// itself, which stays without LibTorch.
#pragma once

#include <optional>

#include "train/commands/commands.h"

namespace rwkv {

// Those of `rookery train`, the launcher's among them.
cxxopts::Options train_options();
// What the help of `rookery train` shows.
inline constexpr const char* kTrainExample =
    "rookery train --config configs/smoke_rwkv4.toml --set train.total_steps=100";

// Launches ranks if options of the launcher are among those given, and returns the exit code of the
// launcher; nothing if there are none, and the command is one rank. Each rank is this program with
// the options that are not the launcher's, and --verbose if `verbose`. Throws std::invalid_argument
// for options that do not go together or are out of range, and whatever load_run_config and RunLock
// throw: a wrong configuration, or a folder in which others train, is reported once and not by
// ranks.
std::optional<int> launch_command(int argc, char** argv, bool verbose);

}  // namespace rwkv
