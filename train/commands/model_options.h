// Options of the commands that run a model: in which numbers, and where.
#pragma once

#include <optional>
#include <string>

#include "model/rwkv_model.h"
#include "train/commands/commands.h"
#include "train/device.h"

namespace rwkv {

// Adds --device.
void add_device_option(cxxopts::OptionAdder& add);
// Adds --dtype, --state and --device.
void add_model_options(cxxopts::OptionAdder& add);

// The model of the file at `path`, as those options say; without --state it starts as in the run
// that it was trained in. Throws as open_model(), load_state() and open_device() do,
// std::runtime_error if the state of its run is gone or another, and std::invalid_argument naming
// an option with a value that is none.
RwkvModel open_model_with(const cxxopts::ParseResult& parsed, const std::string& path);

// The file that --state names, if it names one.
std::optional<std::string> given_state(const cxxopts::ParseResult& parsed);

// What --device says.
OpenDevice open_device_option(const cxxopts::ParseResult& parsed);

}  // namespace rwkv
