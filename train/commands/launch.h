// Commands as the launcher of several ranks (train/distributed/launcher.h): in the program itself,
// which stays without LibTorch.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "train/commands/commands.h"
#include "train/distributed/launcher.h"

namespace rwkv {

// --nproc, --nnodes, --node-rank and --master.
void add_launcher_options(cxxopts::OptionAdder& add);
// Whether one of the launcher's options is among those given.
bool asks_for_launcher(const cxxopts::ParseResult& parsed);
// What they ask for. Each rank is this program with `command` ({"train"}), the options that are not
// the launcher's, and --verbose if `verbose`. Where neither --nproc nor --nnodes is given,
// `ranks_if_absent` are started. Throws std::invalid_argument for options that do not go together
// or are out of range, and where this process is a rank already.
LaunchPlan plan_launch(const cxxopts::ParseResult& parsed,
                       const std::vector<std::string>& command,
                       bool verbose,
                       std::optional<int64_t> ranks_if_absent = {});

// Those of `rookery train`, the launcher's among them.
cxxopts::Options train_options();
// What the help of `rookery train` shows.
inline constexpr const char* kTrainExample =
    "rookery train --config configs/smoke_rwkv4.toml --set train.total_steps=100";

// Launches ranks if options of the launcher are among those given, and returns the exit code of the
// launcher; nothing if there are none, and the command is one rank. Throws what plan_launch,
// load_run_config and RunLock throw: a wrong configuration, or a folder in which others train, is
// reported once and not by ranks.
std::optional<int> launch_command(int argc, char** argv, bool verbose);

// Those of `rookery doctor`, and what its help shows.
cxxopts::Options doctor_options();
inline constexpr const char* kDoctorExample = "rookery doctor --distributed --nproc 2";
// "cpu" or "cuda" of a --device option of several processes, each with a GPU of its own. Throws
// std::invalid_argument for another.
std::string device_of_ranks(const cxxopts::ParseResult& parsed);
// What `rookery doctor --distributed` is to look at. Throws std::invalid_argument for a value out
// of range.
struct DoctorLinks {
  std::string device;  // "cpu" or "cuda"
  int64_t max_bytes;
};
DoctorLinks doctor_links_of(const cxxopts::ParseResult& parsed);
// Runs it, as launcher or as one of its ranks, if it is among the options; nothing if it is not.
// Throws std::invalid_argument for options that do not go together.
std::optional<int> doctor_distributed_command(int argc, char** argv, bool verbose);

}  // namespace rwkv
