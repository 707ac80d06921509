#include "train/report/run_record.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <stdexcept>

#include <nlohmann/json.hpp>
#include <simdjson.h>

#include "data/atomic_file.h"
#include "data/mapped_file.h"
#include "data/number_text.h"
#include "train/config_file.h"

namespace rwkv {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

constexpr std::array<std::string_view, kNumMetrics> kMetricNames = {"step",
                                                                    "total_steps",
                                                                    "tokens",
                                                                    "loss",
                                                                    "smoothed_loss",
                                                                    "validation_loss",
                                                                    "lr",
                                                                    "grad_norm",
                                                                    "tokens_per_s",
                                                                    "mfu",
                                                                    "data_wait",
                                                                    "memory_bytes",
                                                                    "time",
                                                                    "elapsed_s"};

// Calls `read` with each line; those for which it returns false are noted.
void read_lines(const std::string& path,
                const std::function<bool(std::string_view line)>& read,
                std::vector<std::string>& notes) {
  const MappedFile file(path);
  std::string_view rest(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  uint64_t line_number = 0;
  uint64_t num_broken = 0;
  uint64_t first_broken = 0;
  for (size_t end = rest.find('\n'); end != rest.npos; end = rest.find('\n')) {
    ++line_number;
    if (!read(rest.substr(0, end))) {
      first_broken = num_broken == 0 ? line_number : first_broken;
      ++num_broken;
    }
    rest.remove_prefix(end + 1);
  }
  if (num_broken > 0) {
    notes.push_back(path + ":" + std::to_string(first_broken) + ": is no line that a run writes" +
                    (num_broken > 1 ? ", nor are " + grouped(num_broken - 1) + " more" : "") +
                    "; left out");
  }
}

class MetricsReader {
 public:
  bool read(std::string_view line, MetricsTable& table) {
    line_.assign(line);
    std::array<double, kNumMetrics> row;
    row.fill(kNone);
    simdjson::dom::object object;
    if (parser_.parse(line_).get(object) != simdjson::SUCCESS) {
      return false;
    }
    for (const auto& [key, value] : object) {
      const auto found = std::ranges::find(kMetricNames, key);
      if (found != kMetricNames.end()) {
        // null, as JSON has no NaN, stays none.
        [[maybe_unused]] const auto error =
            value.get_double().get(row[static_cast<size_t>(found - kMetricNames.begin())]);
      }
    }
    if (!std::isfinite(row[static_cast<size_t>(Metric::kStep)])) {
      return false;
    }
    table.add(row);
    return true;
  }

 private:
  simdjson::dom::parser parser_;
  std::string line_;
};

// Ours have about 1 KB and 8 KB; and keys in their order take time by the square of their number.
constexpr size_t kMaxStartBytes = size_t{1} << 16;
constexpr size_t kMaxConfigBytes = size_t{1} << 18;

template <typename Json>
Json parse_object(std::string_view line) {
  Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  return json.is_object() ? json : Json();
}

template <typename T, typename Json>
T value_or(const Json& json, const char* name, T otherwise) {
  const auto found = json.find(name);
  const bool fits =
      found != json.end() && (std::is_same_v<T, std::string> ? found->is_string()
                              : std::is_same_v<T, int64_t>   ? found->is_number_integer()
                                                             : found->is_number());
  return fits ? found->template get<T>() : otherwise;
}

bool read_sample(std::string_view line, std::vector<RunSample>& samples) {
  const auto json = parse_object<nlohmann::json>(line);
  if (!json.is_object() || !json.contains("text")) {
    return false;
  }
  samples.push_back({.step = value_or<int64_t>(json, "step", 0),
                     .tokens = value_or<int64_t>(json, "tokens", 0),
                     .prompt = value_or<std::string>(json, "prompt", ""),
                     .text = value_or<std::string>(json, "text", "")});
  return true;
}

bool read_start(std::string_view line, std::vector<RunStart>& starts) {
  if (line.size() > kMaxStartBytes) {
    return false;
  }
  const auto json = parse_object<nlohmann::ordered_json>(line);
  if (!json.is_object()) {
    return false;
  }
  RunStart start{.time_s = value_or<double>(json, "time", 0),
                 .step = value_or<int64_t>(json, "step", 0),
                 .facts = {}};
  for (const auto& [key, value] : json.items()) {
    start.facts.emplace_back(key, value.is_string() ? value.get<std::string>() : value.dump());
  }
  starts.push_back(std::move(start));
  return true;
}

}  // namespace

std::string_view name_of(Metric metric) {
  return kMetricNames[static_cast<size_t>(metric)];
}

double MetricsTable::last(Metric metric) const {
  const std::vector<double>& values = column(metric);
  const auto found =
      std::find_if(values.rbegin(), values.rend(), [](double value) { return !std::isnan(value); });
  return found == values.rend() ? kNone : *found;
}

void MetricsTable::add(const std::array<double, kNumMetrics>& row) {
  while (num_rows() > 0 && columns_[0].back() >= row[0]) {
    for (std::vector<double>& values : columns_) {
      values.pop_back();
    }
  }
  for (size_t i = 0; i < kNumMetrics; ++i) {
    columns_[i].push_back(row[i]);
  }
}

RunRecord read_run(const std::string& folder) {
  namespace fs = std::filesystem;
  const fs::path run = fs::absolute(folder).lexically_normal();
  const auto path = [&](const char* name) { return (fs::path(folder) / name).string(); };
  if (!fs::exists(path("metrics.jsonl"))) {
    throw std::runtime_error(
        folder + ": " + (fs::is_directory(folder) ? "holds no metrics.jsonl" : "is no folder") +
        "; give the folder of a run, which `rookery train` names as train.run_dir");
  }
  RunRecord record{.folder = folder,
                   .name = (run.has_filename() ? run : run.parent_path()).filename().string(),
                   .metrics = {},
                   .samples = {},
                   .starts = {},
                   .config = {},
                   .notes = {}};
  MetricsReader metrics;
  read_lines(
      path("metrics.jsonl"),
      [&](std::string_view line) { return metrics.read(line, record.metrics); },
      record.notes);
  if (fs::exists(path("samples.jsonl"))) {
    read_lines(
        path("samples.jsonl"),
        [&](std::string_view line) { return read_sample(line, record.samples); },
        record.notes);
  }
  if (fs::exists(path("starts.jsonl"))) {
    read_lines(
        path("starts.jsonl"),
        [&](std::string_view line) { return read_start(line, record.starts); },
        record.notes);
  }
  if (fs::exists(path("config.toml"))) {
    try {
      record.config =
          list_values(read_text_file(path("config.toml"), kMaxConfigBytes), path("config.toml"));
    } catch (const std::exception& error) {
      record.notes.push_back(std::string(error.what()) + "; left out");
    }
  }
  return record;
}

void tell_apart(std::span<RunRecord> runs) {
  std::map<std::string, int> times;
  for (const RunRecord& run : runs) {
    ++times[run.name];
  }
  for (RunRecord& run : runs) {
    run.name = times[run.name] > 1 ? run.folder : run.name;
  }
}

std::string_view find(const TextTable& table, std::string_view name) {
  const auto found = std::ranges::find(table, name, [](const auto& row) { return row.first; });
  return found == table.end() ? std::string_view() : found->second;
}

}  // namespace rwkv
