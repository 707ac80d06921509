#include "train/report/report_page.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <set>
#include <stdexcept>

#include <fmt/format.h>

#include "data/number_text.h"
#include "train/metrics.h"
#include "train/report/chart.h"
#include "train/report/report_curves.h"
#include "train/report/report_style.h"

namespace rwkv {
namespace {

constexpr size_t kSamplesShown = 20;
constexpr size_t kSampleBytes = 6000;
constexpr size_t kStartsShown = 50;

constexpr const char* kUnknown = "–";

std::string number(double value, int decimals) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, decimals) : kUnknown;
}

std::string count(double value) {
  // Below 2^63, so that it is a whole number's.
  return value >= 0 && value < 9e18 ? grouped(static_cast<uint64_t>(value)) : kUnknown;
}

std::string bytes_text(double bytes) {
  constexpr double kGib = 1024.0 * 1024 * 1024;
  if (!std::isfinite(bytes)) {
    return kUnknown;
  }
  return bytes >= kGib ? fmt::format("{:.2f} GiB", bytes / kGib)
                       : fmt::format("{:.0f} MiB", bytes / (1024 * 1024));
}

std::string duration(double seconds) {
  return std::isfinite(seconds) && seconds >= 0 ? format_duration(seconds) : kUnknown;
}

std::string time_text(double time_s) {
  if (!(time_s > 0 && time_s < 1e11)) {
    return kUnknown;
  }
  const auto time = static_cast<std::time_t>(time_s);
  std::tm parts{};
  if (gmtime_r(&time, &parts) == nullptr) {
    return kUnknown;
  }
  return fmt::format("{}-{:02}-{:02} {:02}:{:02} UTC",
                     parts.tm_year + 1900,
                     parts.tm_mon + 1,
                     parts.tm_mday,
                     parts.tm_hour,
                     parts.tm_min);
}

double best(const std::vector<double>& values) {
  double least = std::nan("");
  for (const double value : values) {
    least = std::isnan(least) || value < least ? value : least;
  }
  return least;
}

double greatest(const std::vector<double>& values) {
  double most = std::nan("");
  for (const double value : values) {
    most = std::isnan(most) || value > most ? value : most;
  }
  return most;
}

double median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return std::isnan(value); });
  if (values.empty()) {
    return std::nan("");
  }
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// ---- Figures ----------------------------------------------------------------------------------

struct Figure {
  std::string name;
  std::string value;
};

std::vector<Figure> figures_of(const RunRecord& run) {
  const MetricsTable& table = run.metrics;
  const double step = table.last(Metric::kStep);
  const double total = table.last(Metric::kTotalSteps);
  const double mfu = median(table.column(Metric::kMfu));
  const double wait = median(table.column(Metric::kDataWait));
  std::vector<Figure> figures = {
      {"Steps", count(step) + (std::isfinite(total) && total != step ? " of " + count(total) : "")},
      {"Tokens", count(table.last(Metric::kTokens))},
      {"Loss, smoothed", number(table.last(Metric::kSmoothedLoss), 4)},
      {"Validation, last", number(table.last(Metric::kValidationLoss), 4)},
      {"Validation, best", number(best(table.column(Metric::kValidationLoss)), 4)},
      {"Tokens/s, median", count(median(table.column(Metric::kTokensPerS)))},
      {"MFU, median", number(100 * mfu, 1) + (std::isfinite(mfu) ? " %" : "")},
      {"Data wait, median", number(100 * wait, 1) + (std::isfinite(wait) ? " %" : "")},
      {"Peak memory", bytes_text(greatest(table.column(Metric::kMemoryBytes)))},
      {"Training time", duration(table.last(Metric::kElapsedS))},
      {"Restarts", run.starts.empty() ? kUnknown : std::to_string(run.starts.size() - 1)},
  };
  return figures;
}

std::string draw_tiles(const RunRecord& run) {
  std::string html = "<dl class=\"tiles\">";
  for (const Figure& figure : figures_of(run)) {
    if (figure.value != kUnknown) {
      html += "<div><dt>" + figure.name + "</dt><dd>" + figure.value + "</dd></div>";
    }
  }
  return html + "</dl>\n";
}

std::string head_of_runs(std::span<const RunRecord> runs, const char* corner, const char* column) {
  std::string html = fmt::format("<div class=\"scroll\"><table><thead><tr><th>{}</th>", corner);
  for (size_t i = 0; i < runs.size(); ++i) {
    html += fmt::format("<th{}><span class=\"key {}\">{}</span></th>",
                        column,
                        colour_class(i),
                        escape_html(runs[i].name));
  }
  return html + "</tr></thead><tbody>";
}

std::string draw_figure_table(std::span<const RunRecord> runs) {
  std::vector<std::vector<Figure>> figures;
  for (const RunRecord& run : runs) {
    figures.push_back(figures_of(run));
  }
  std::string html = "<h2>Final figures</h2>" + head_of_runs(runs, "", " class=\"n\"");
  for (size_t row = 0; row < figures[0].size(); ++row) {
    std::string cells;
    bool any = false;
    for (const std::vector<Figure>& of_run : figures) {
      cells += "<td class=\"n\">" + of_run[row].value + "</td>";
      any = any || of_run[row].value != kUnknown;
    }
    html += any ? "<tr><th>" + figures[0][row].name + "</th>" + cells + "</tr>" : "";
  }
  return html + "</tbody></table></div>\n";
}

// ---- Samples, configuration, environment ------------------------------------------------------

std::string shortened(const std::string& text) {
  return text.size() <= kSampleBytes ? text : text.substr(0, kSampleBytes) + " [...]";
}

std::string draw_sample(const RunSample& sample, bool open) {
  // Whichever way the run wrote it, the prompt is shown once.
  std::string_view text = sample.text;
  if (text.starts_with(sample.prompt)) {
    text.remove_prefix(sample.prompt.size());
  }
  return fmt::format(
      "<details{}><summary>Step {} <span class=\"quiet\">after {} tokens</span></summary>"
      "<pre><b>{}</b>{}</pre></details>\n",
      open ? " open" : "",
      count(static_cast<double>(sample.step)),
      count(static_cast<double>(sample.tokens)),
      escape_html(shortened(sample.prompt)),
      escape_html(shortened(std::string(text))));
}

// The last comes first; of many, some from first to last.
std::string draw_samples(const RunRecord& run) {
  if (run.samples.empty()) {
    return "";
  }
  const size_t shown = std::min(run.samples.size(), kSamplesShown);
  std::string html = "<h2>Samples</h2>\n";
  if (shown < run.samples.size()) {
    html += fmt::format(
        "<p class=\"quiet\">{} of {}, spread over the run.</p>", shown, run.samples.size());
  }
  for (size_t i = 0; i < shown; ++i) {
    const size_t from_end = shown == 1 ? 0 : i * (run.samples.size() - 1) / (shown - 1);
    html += draw_sample(run.samples[run.samples.size() - 1 - from_end], i == 0);
  }
  return html;
}

std::string draw_facts(const TextTable& facts) {
  std::string html = "<div class=\"scroll\"><table class=\"facts\"><tbody>";
  std::string section;
  for (const auto& [key, value] : facts) {
    const size_t dot = key.find('.');
    if (dot != key.npos && key.substr(0, dot) != section) {
      section = key.substr(0, dot);
      html += "<tr class=\"section\"><th colspan=\"2\">[" + escape_html(section) + "]</th></tr>";
    }
    html += "<tr><th>" + escape_html(dot == key.npos ? key : key.substr(dot + 1)) + "</th><td>" +
            escape_html(value) + "</td></tr>";
  }
  return html + "</tbody></table></div>\n";
}

std::string draw_differences(std::span<const RunRecord> runs) {
  std::vector<std::string> keys;
  for (const RunRecord& run : runs) {
    for (const auto& [key, value] : run.config) {
      // A run's own folder always differs.
      if (key != "train.run_dir" && std::ranges::find(keys, key) == keys.end()) {
        keys.push_back(key);
      }
    }
  }
  std::string rows;
  for (const std::string& key : keys) {
    std::set<std::string_view> values;
    std::string row = "<tr><th><code>" + escape_html(key) + "</code></th>";
    for (const RunRecord& run : runs) {
      const std::string_view value = find(run.config, key);
      values.insert(value);
      row += "<td><code>" + (value.empty() ? kUnknown : escape_html(value)) + "</code></td>";
    }
    rows += values.size() > 1 ? row + "</tr>" : "";
  }
  if (rows.empty()) {
    return "<p class=\"quiet\">The configurations are equal.</p>\n";
  }
  return head_of_runs(runs, "Keys that differ", "") + rows + "</tbody></table></div>\n";
}

std::string readable_fact(const std::string& key, const std::string& value) {
  char* end = nullptr;
  const double amount = std::strtod(value.c_str(), &end);
  if (end == value.c_str() || *end != '\0') {
    return value;
  }
  if (key == "time") {
    return time_text(amount);
  }
  if (key.ends_with("_bytes")) {
    return bytes_text(amount);
  }
  if (key.ends_with("_flops_per_s")) {
    return fmt::format("{:.1f} GFLOP/s", amount / 1e9);
  }
  // What is left are counts.
  return amount == std::floor(amount) ? count(amount) : value;
}

std::string draw_starts(const RunRecord& run) {
  constexpr const char* kColumns[] = {
      "processor", "cores", "threads", "memory_bytes", "rookery", "libtorch"};
  std::string html;
  const size_t first = run.starts.size() - std::min(run.starts.size(), kStartsShown);
  if (first > 0) {
    html += fmt::format(
        "<p class=\"quiet\">The last {} of {} starts.</p>", kStartsShown, run.starts.size());
  }
  html += "<div class=\"scroll\"><table><thead><tr><th>Started</th><th class=\"n\">after step</th>";
  for (const char* column : kColumns) {
    html += "<th>" + std::string(column) + "</th>";
  }
  html += "</tr></thead><tbody>";
  for (size_t i = first; i < run.starts.size(); ++i) {
    const RunStart& start = run.starts[i];
    html += "<tr><td>" + time_text(start.time_s) + "</td><td class=\"n\">" +
            count(static_cast<double>(start.step)) + "</td>";
    for (const char* column : kColumns) {
      html += "<td>" + escape_html(readable_fact(column, std::string(find(start.facts, column)))) +
              "</td>";
    }
    html += "</tr>";
  }
  return html + "</tbody></table></div>\n";
}

std::string draw_environment(const RunRecord& run) {
  if (run.starts.empty()) {
    return "";
  }
  TextTable facts = run.starts.back().facts;
  for (auto& [key, value] : facts) {
    value = readable_fact(key, value);
  }
  return "<h2>Environment</h2>\n" +
         (run.starts.size() > 1 ? draw_starts(run) + "<p></p><p class=\"quiet\">The last start:</p>"
                                : "") +
         draw_facts(facts);
}

std::string draw_config(const RunRecord& run) {
  return run.config.empty() ? "" : "<h2>Configuration</h2>\n" + draw_facts(run.config);
}

std::string draw_notes(const RunRecord& run) {
  std::string html;
  for (const std::string& note : run.notes) {
    html += "<p class=\"note\">" + escape_html(note) + "</p>\n";
  }
  return html;
}

std::string when(const RunRecord& run) {
  const double end = run.metrics.last(Metric::kTime);
  const double begin = run.starts.empty() ? std::nan("") : run.starts.front().time_s;
  std::string text = escape_html(run.folder);
  if (std::isfinite(begin)) {
    text += ", begun " + time_text(begin);
  }
  if (std::isfinite(end)) {
    text += ", last step logged " + time_text(end);
  }
  return "<p class=\"quiet\">" + text + "</p>\n";
}

std::string draw_one(const RunRecord& run) {
  return "<h1>" + escape_html(run.name) + "</h1>\n" + when(run) + draw_notes(run) +
         draw_tiles(run) + draw_curves({&run, 1}) + draw_samples(run) + draw_config(run) +
         draw_environment(run);
}

std::string draw_several(std::span<const RunRecord> runs) {
  std::string html = fmt::format("<h1>{} runs compared</h1>\n", runs.size());
  for (const RunRecord& run : runs) {
    html += draw_notes(run);
  }
  html += draw_figure_table(runs) + draw_curves(runs) + "<h2>Configuration</h2>\n" +
          draw_differences(runs);
  html += "<h2>Each run</h2>\n";
  for (const RunRecord& run : runs) {
    html += "<details><summary>" + escape_html(run.name) + "</summary>" + when(run) +
            draw_samples(run) + draw_config(run) + draw_environment(run) + "</details>\n";
  }
  return html;
}

}  // namespace

std::string make_report(std::span<const RunRecord> runs) {
  if (runs.empty()) {
    throw std::invalid_argument("a report needs a run; give the folder of one");
  }
  const std::string title =
      runs.size() == 1 ? runs[0].name : fmt::format("{} runs compared", runs.size());
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">"
      "<title>{}</title><style>{}</style></head>\n<body><main>\n{}"
      "<footer>Written by rookery report.</footer></main><script>{}</script></body></html>\n",
      escape_html(title),
      kReportStyle,
      runs.size() == 1 ? draw_one(runs[0]) : draw_several(runs),
      kReportScript);
}

}  // namespace rwkv
