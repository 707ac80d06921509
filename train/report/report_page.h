// The page that `rookery report` writes: what one run did, or how several compare. One HTML file
// that asks nothing of a network: curves are inline SVG, all text is escaped.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "train/report/run_record.h"

namespace rwkv {

// The page of one run, or of several side by side. Below 2 MB for up to a dozen runs, however long
// they are, unless what their lines say is itself longer.
// Throws std::invalid_argument if `runs` is empty.
std::string make_report(std::span<const RunRecord> runs);

}  // namespace rwkv
