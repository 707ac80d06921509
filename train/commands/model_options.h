// Options of the commands that run a model: in which numbers, and where.
#pragma once

#include <string>

#include "model/rwkv_model.h"
#include "train/commands/commands.h"
#include "train/device.h"

namespace rwkv {

// Adds --device.
void add_device_option(cxxopts::OptionAdder& add);
// Adds --dtype, --state and --device.
void add_model_options(cxxopts::OptionAdder& add);

// The model of the file at `path`, as those options say. Throws as open_model(), load_state()
// and open_device() do, and std::invalid_argument naming an option with a value that is none.
RwkvModel open_model_with(const cxxopts::ParseResult& parsed, const std::string& path);

// What --device says.
OpenDevice open_device_option(const cxxopts::ParseResult& parsed);

}  // namespace rwkv
