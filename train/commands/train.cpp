#include <iostream>
#include <stdexcept>

#include <spdlog/spdlog.h>

#include "train/commands/commands.h"
#include "train/commands/launch.h"
#include "train/distributed/placement.h"
#include "train/run_main.h"
#include "train/run_setup.h"
#include "train/stop_signal.h"
#include "train/trainer.h"

namespace rwkv {
namespace {

std::string replay(const RunConfig& config, int64_t step) {
  if (step < 1) {
    throw std::invalid_argument("--replay " + std::to_string(step) + ": steps count from 1");
  }
  Trainer trainer = Trainer::before_step(config, step);
  while (trainer.state().step < step - 1) {
    trainer.step();
  }
  return trainer.replay();
}

// What follows from the corpus and the weights, too, if they can be read.
RunConfig resolved_if_possible(const RunConfig& config) {
  try {
    return resolve_run_config(config);
  } catch (const std::runtime_error& error) {
    spdlog::warn("{}; printed without what would follow from it", error.what());
    return config;
  }
}

}  // namespace

int train_command(int argc, char** argv) {
  cxxopts::Options options = train_options();
  const auto parsed = parse_options(options, argc, argv, kTrainExample, {"config"});
  if (!parsed) {
    return 0;
  }
  const auto sets = parsed->count("set") > 0 ? (*parsed)["set"].as<std::vector<std::string>>()
                                             : std::vector<std::string>{};
  const RunConfig config = load_run_config((*parsed)["config"].as<std::string>(), sets);
  if (parsed->count("print-config") > 0) {
    std::cout << to_toml(resolved_if_possible(config));
    return 0;
  }
  if (parsed->count("replay") > 0) {
    std::cout << replay(config, (*parsed)["replay"].as<int64_t>());
    return 0;
  }
  catch_stop_signals();
  const RunEnd end = Trainer(config, placement_from_environment()).run();
  return end.signal == 0 ? 0 : kExitSignal + end.signal;
}

}  // namespace rwkv
