#include "train/commands/launch.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string_view>

#include "train/buckets.h"
#include "train/run_config.h"
#include "train/run_folder.h"
#include "train/torch_library.h"

namespace rwkv {
namespace {

constexpr const char* kExample = "rookery train --config run.toml --nproc 2";
constexpr std::array<const char*, 5> kLauncherOptions = {
    "nproc", "nnodes", "node-rank", "master", "max-restarts"};
// Two pipes each; more than the cores or GPUs of any machine.
constexpr int64_t kMostRanksHere = 1024;
constexpr int64_t kMostNodes = 100'000;
constexpr int64_t kMostRestarts = 1'000'000;
constexpr int64_t kBucketMegabytes = Sharding{}.bucket_bytes >> 20;

bool is_launcher_option(const std::string& name) {
  return std::find(kLauncherOptions.begin(), kLauncherOptions.end(), name) !=
         kLauncherOptions.end();
}

// The value of a number's option, `fallback` if it is not given.
int64_t number_of(const cxxopts::ParseResult& parsed,
                  const std::string& name,
                  int64_t fallback,
                  int64_t least,
                  int64_t most) {
  if (parsed.count(name) == 0) {
    return fallback;
  }
  const auto value = parsed[name].as<int64_t>();
  if (value < least || value > most) {
    throw std::invalid_argument("--" + name + " " + std::to_string(value) +
                                ": expected a number from " + std::to_string(least) + " to " +
                                std::to_string(most));
  }
  return value;
}

// "host:29500", or "[fe80::1]:29500", into the plan.
void read_master(const std::string& text, LaunchPlan& plan) {
  const size_t colon = text.rfind(':');
  std::string host = text.substr(0, std::min(colon, text.size()));
  if (host.starts_with('[') && host.ends_with(']')) {
    host = host.substr(1, host.size() - 2);
  } else if (host.find(':') != host.npos) {
    host.clear();
  }
  const std::string port = colon == text.npos ? "" : text.substr(colon + 1);
  const bool is_number =
      !port.empty() && port.size() <= 5 && port.find_first_not_of("0123456789") == port.npos;
  if (host.empty() || !is_number || std::stoll(port) < 1 || std::stoll(port) > 65535) {
    throw std::invalid_argument("--master " + text +
                                ": expected HOST:PORT, the machine with --node-rank 0 and a port "
                                "from 1 to 65535 that is free there, as in node01:29500");
  }
  plan.master_host = host;
  plan.master_port = std::stoll(port);
}

LaunchPlan read_plan(const cxxopts::ParseResult& parsed, std::optional<int64_t> ranks_if_absent) {
  LaunchPlan plan;
  plan.ranks_here = number_of(parsed, "nproc", ranks_if_absent.value_or(1), 1, kMostRanksHere);
  plan.num_nodes = number_of(parsed, "nnodes", 1, 1, kMostNodes);
  plan.node_rank = number_of(parsed, "node-rank", 0, 0, plan.num_nodes - 1);
  plan.max_restarts = number_of(parsed, "max-restarts", plan.max_restarts, 0, kMostRestarts);
  if (parsed.count("master") > 0) {
    read_master(parsed["master"].as<std::string>(), plan);
  }
  if (plan.num_nodes > 1) {
    for (const char* name : {"node-rank", "master"}) {
      if (parsed.count(name) == 0) {
        throw std::invalid_argument(
            "--nnodes " + std::to_string(plan.num_nodes) + " is given, but --" + name +
            " is not; for example on the second of two: --nnodes 2 --node-rank 1 --master "
            "node01:29500");
      }
    }
  }
  return plan;
}

void check_no_rank() {
  if (const char* rank = std::getenv("RANK"); rank != nullptr && *rank != '\0') {
    throw std::invalid_argument("environment: RANK = \"" + std::string(rank) +
                                "\": torchrun or another launcher started this process as one of "
                                "its ranks; leave out --nproc and --nnodes, or unset RANK");
  }
}

void check_launchable(const cxxopts::ParseResult& parsed) {
  for (const char* name : {"replay", "print-config"}) {
    if (parsed.count(name) > 0) {
      throw std::invalid_argument("--" + std::string(name) +
                                  " is of one process; leave out --nproc and --nnodes");
    }
  }
  // Read here, and by every rank again.
  const auto config = parsed["config"].as<std::string>();
  if (std::filesystem::exists(config) && !std::filesystem::is_regular_file(config)) {
    throw std::invalid_argument("--config " + config +
                                " is no file that several ranks could read; write it to one");
  }
}

// What a rank is started with.
std::vector<std::string> arguments_of_rank(const cxxopts::ParseResult& parsed,
                                           const std::vector<std::string>& command,
                                           bool verbose) {
  std::vector<std::string> arguments = {std::filesystem::read_symlink("/proc/self/exe").string()};
  arguments.insert(arguments.end(), command.begin(), command.end());
  for (const cxxopts::KeyValue& option : parsed.arguments()) {
    if (!is_launcher_option(option.key())) {
      arguments.push_back("--" + option.key() + "=" + option.value());
    }
  }
  if (verbose) {
    arguments.emplace_back("--verbose");
  }
  return arguments;
}

}  // namespace

void add_launcher_options(cxxopts::OptionAdder& add) {
  add("nproc", "start this many ranks on this machine", cxxopts::value<int64_t>());
  add("nnodes",
      "machines that work together, each with a launcher and --nproc ranks; 1 if absent",
      cxxopts::value<int64_t>());
  add("node-rank", "which of them this is, from 0", cxxopts::value<int64_t>());
  add("master",
      "HOST:PORT at which rank 0 can be reached: machine 0, and a port that is free there",
      cxxopts::value<std::string>());
}

bool asks_for_launcher(const cxxopts::ParseResult& parsed) {
  return std::any_of(kLauncherOptions.begin(), kLauncherOptions.end(), [&](const char* name) {
    return parsed.count(name) > 0;
  });
}

LaunchPlan plan_launch(const cxxopts::ParseResult& parsed,
                       const std::vector<std::string>& command,
                       bool verbose,
                       std::optional<int64_t> ranks_if_absent) {
  if (!ranks_if_absent && parsed.count("nproc") == 0 && parsed.count("nnodes") == 0) {
    throw std::invalid_argument(
        "options of the launcher are given, but neither --nproc nor --nnodes; for example: " +
        std::string(kExample));
  }
  check_no_rank();
  LaunchPlan plan = read_plan(parsed, ranks_if_absent);
  // Not by its name: the program that runs, though a build may have put another in its place.
  plan.program = "/proc/self/exe";
  plan.arguments = arguments_of_rank(parsed, command, verbose);
  return plan;
}

cxxopts::Options train_options() {
  cxxopts::Options options("rookery train",
                           "Trains a model. Started again in its train.run_dir, a run goes on from "
                           "its newest checkpoint.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("config", "the run's TOML file", cxxopts::value<std::string>());
  add("set",
      "section.key=value, over what the file says; may be given again",
      cxxopts::value<std::vector<std::string>>());
  add("replay",
      "do this step again, from the newest checkpoint before it, with a look at every op's result; "
      "changes nothing",
      cxxopts::value<int64_t>());
  add("print-config", "print the configuration with all that follows from it, and end");
  add_launcher_options(add);
  add("max-restarts",
      "start all ranks anew this often when one fails; 3 if absent",
      cxxopts::value<int64_t>());
  return options;
}

std::optional<int> launch_command(int argc, char** argv, bool verbose) {
  cxxopts::Options options = train_options();
  const auto parsed = parse_options(options, argc, argv, kTrainExample, {"config"});
  if (!parsed) {
    return 0;
  }
  if (!asks_for_launcher(*parsed)) {
    return std::nullopt;
  }
  LaunchPlan plan = plan_launch(*parsed, {"train"}, verbose);
  check_launchable(*parsed);
  const auto sets = parsed->count("set") > 0 ? (*parsed)["set"].as<std::vector<std::string>>()
                                             : std::vector<std::string>{};
  plan.run_dir = load_run_config((*parsed)["config"].as<std::string>(), sets).train.run_dir;
  if (plan.node_rank == 0) {
    // Rank 0 will hold it. Looked at here, a folder in which others train ends the launcher, and is
    // no failure of a rank to start again after.
    const RunLock free_now(plan.run_dir);
  }
  return launch(plan).exit_code;
}

cxxopts::Options doctor_options() {
  cxxopts::Options options(
      "rookery doctor",
      "Looks at the machine: can it train, how well, and what to do about what\n"
      "is wrong. Ends with 0 if training can run, else with 1. Writes 64 MB into\n"
      "the current folder for a moment, to see how fast that is.\n\n"
      "With --distributed: looks at what lies between the processes of a run, started\n"
      "as those of rookery train are, by --nproc, torchrun, srun or mpirun. Ends with 1\n"
      "if something arrives that is wrong.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("json", "all of it as JSON");
  add("distributed", "time each operation that training uses, and each link between processes");
  add("device",
      "cpu, or cuda: a GPU for each process of a machine; with --distributed",
      cxxopts::value<std::string>()->default_value("cpu"));
  add("max-megabytes",
      "of the largest operation, 1 to 10000; with --distributed",
      cxxopts::value<int64_t>()->default_value(std::to_string(kBucketMegabytes)));
  add_launcher_options(add);
  return options;
}

std::string device_of_ranks(const cxxopts::ParseResult& parsed) {
  const std::string device = parsed["device"].as<std::string>();
  if (device != "cpu" && device != "cuda") {
    throw std::invalid_argument("--device " + device +
                                ": expected cpu, or cuda for a GPU of each process");
  }
  return device;
}

DoctorLinks doctor_links_of(const cxxopts::ParseResult& parsed) {
  constexpr int64_t kMostMegabytes = 10'000;
  return {.device = device_of_ranks(parsed),
          .max_bytes = number_of(parsed, "max-megabytes", kBucketMegabytes, 1, kMostMegabytes)
                       << 20};
}

std::optional<int> doctor_distributed_command(int argc, char** argv, bool verbose) {
  cxxopts::Options options = doctor_options();
  const auto parsed = parse_options(options, argc, argv, kDoctorExample, {});
  if (!parsed) {
    return 0;
  }
  if (parsed->count("distributed") == 0) {
    if (asks_for_launcher(*parsed) ||
        parsed->count("device") + parsed->count("max-megabytes") > 0) {
      throw std::invalid_argument(
          "rookery doctor: --nproc, --nnodes, --node-rank, --master, --device and --max-megabytes "
          "are of --distributed; give it, too");
    }
    return std::nullopt;
  }
  doctor_links_of(*parsed);
  if (!asks_for_launcher(*parsed)) {
    return run_torch_command("doctor", argc, argv, verbose);
  }
  LaunchPlan plan = plan_launch(*parsed, {"doctor"}, verbose);
  plan.max_restarts = 0;
  return launch(plan).exit_code;
}

}  // namespace rwkv
