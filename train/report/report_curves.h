// The curves of a report's page: what is drawn, over what, and in which colours.
#pragma once

#include <span>
#include <string>

#include "train/report/run_record.h"

namespace rwkv {

// A heading, and a chart each for loss, its second half, learning rate, gradient norm, speed, MFU,
// waiting and memory, as far as the runs have numbers of it. Over steps, with their tokens below,
// if the steps of all runs have one number of tokens, else over tokens. At least one run.
std::string draw_curves(std::span<const RunRecord> runs);

}  // namespace rwkv
