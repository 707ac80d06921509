// What a run left in its folder (train/run_folder.h), read to be looked at: also while the run goes
// on, and also of a run of another release of the program.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace rwkv {

// Numbers of metrics.jsonl, under the names that they have there.
enum class Metric {
  kStep,
  kTotalSteps,
  kTokens,
  kLoss,
  kSmoothedLoss,
  kValidationLoss,
  kLr,
  kGradNorm,
  kTokensPerS,
  kMfu,
  kDataWait,
  kMemoryBytes,
  kTime,
  kElapsedS,
};
inline constexpr size_t kNumMetrics = 14;
std::string_view name_of(Metric metric);

// A row for each logged step, by rising step.
class MetricsTable {
 public:
  // As many as rows; NaN where a line has no such number.
  const std::vector<double>& column(Metric metric) const {
    return columns_[static_cast<size_t>(metric)];
  }
  size_t num_rows() const { return columns_[0].size(); }
  // The last number that is there; NaN if none is.
  double last(Metric metric) const;

  // Drops the rows from that step on, which an interrupted run left, before it adds the row.
  void add(const std::array<double, kNumMetrics>& row);

 private:
  std::array<std::vector<double>, kNumMetrics> columns_;
};

struct RunSample {
  int64_t step = 0;
  int64_t tokens = 0;
  std::string prompt;
  std::string text;  // with the prompt or without, as the run wrote it
};

// Names and values as texts, in the order of the file.
using TextTable = std::vector<std::pair<std::string, std::string>>;

struct RunStart {
  double time_s = 0;  // since 1970
  int64_t step = 0;   // after which the run went on
  TextTable facts;    // all that the line says
};

struct RunRecord {
  std::string folder;
  std::string name;  // last part of the folder's path, unless tell_apart() changes it
  MetricsTable metrics;
  std::vector<RunSample> samples;
  std::vector<RunStart> starts;
  TextTable config;  // "model.n_layer", "6"; values as TOML
  // What could not be read and was left out, a sentence each.
  std::vector<std::string> notes;
};

// Reads RUN/metrics.jsonl, samples.jsonl, starts.jsonl and config.toml. Files but the first may be
// missing; a broken line is left out and noted, a last one that is being written left out. Throws
// std::runtime_error naming the file if there is no metrics.jsonl, or if a file cannot be read.
RunRecord read_run(const std::string& folder);

// Names runs whose names are the same by their folders as given.
void tell_apart(std::span<RunRecord> runs);

// The value of a key, or an empty text.
std::string_view find(const TextTable& table, std::string_view name);

}  // namespace rwkv
