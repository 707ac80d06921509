// What every benchmark shares: repeated timing, and rows of figures. A floor is the time that the
// arithmetic or the bytes cannot go under on this machine, at the rates measured in the same run.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace rwkv {

// Of repeated timings of one thing, in milliseconds.
struct Spread {
  double median = 0;
  double min = 0;
  double max = 0;
  int64_t repeats = 0;
};
// Of at least one timing; the median of an even number is between the two in the middle.
Spread spread_of(std::vector<double> milliseconds);

double milliseconds_of(const std::function<void()>& work);
// Calls `work` `warm_up` times, then times it `repeats` times.
Spread time_repeated(int64_t warm_up, int64_t repeats, const std::function<void()>& work);

// Figures carry their units in their names ("floor_ms").
using Figures = std::vector<std::pair<std::string, double>>;

// One line of a benchmark's table.
struct BenchRow {
  std::string what;
  Spread ms;
  Figures figures;
  // What the figures depend on: "threads", and the rates of the machine that floors are made of.
  // Not in the table, which they would widen beyond a terminal.
  Figures conditions = {};
  // What the time consists of, if it was looked at: with figures of their own.
  std::vector<BenchRow> parts = {};
};

// A table to read: `what`, the median with its spread, then a column for every figure of the first
// row; others may have fewer. Parts follow in tables of their own, each under its row's `what`.
std::string format_rows(const std::vector<BenchRow>& rows);
// The same as a JSON array of objects: what, median_ms, min_ms, max_ms, repeats, the object
// "conditions", the array "parts" and the figures.
std::string rows_to_json(const std::vector<BenchRow>& rows);

// Runs `work` in a process of its own and returns its rows: what one benchmark leaves in memory and
// in allocators does not show in the next one's figures. Call it before anything starts threads.
// Throws std::runtime_error with the text of what `work` threw.
std::vector<BenchRow> in_own_process(const std::function<std::vector<BenchRow>()>& work);

}  // namespace rwkv
