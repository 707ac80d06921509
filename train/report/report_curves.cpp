#include "train/report/report_curves.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "train/report/chart.h"

namespace rwkv {
namespace {

// Columns of a chart for one run, and in all: as many as a wide screen shows, and no more points
// than keep the page small.
constexpr size_t kChartColumns = 600;
constexpr size_t kColumnsOfAllRuns = 2400;
// Beyond that many rows a noisy line is drawn faint, and means of it on top.
constexpr size_t kMeanColumns = 120;

// The second half of a run is drawn apart if it has that many rows; of fewer the whole shows each.
constexpr size_t kLeastRowsOfHalf = 10;

constexpr size_t kValidationColour = 1;
constexpr size_t kRestartColour = 6;

// Times the run went on after it had begun.
std::vector<double> restart_steps(const RunRecord& run) {
  std::vector<double> steps;
  for (size_t i = 1; i < run.starts.size(); ++i) {
    steps.push_back(static_cast<double>(run.starts[i].step));
  }
  return steps;
}

// Tokens of a step if all runs have one number of them, so that both can stand below a chart.
double common_tokens_per_step(std::span<const RunRecord> runs) {
  double common = 0;
  for (const RunRecord& run : runs) {
    const auto& steps = run.metrics.column(Metric::kStep);
    const auto& tokens = run.metrics.column(Metric::kTokens);
    for (size_t i = 0; i < steps.size(); ++i) {
      const double ratio = tokens[i] / steps[i];
      if (!std::isfinite(ratio) || (common != 0 && std::abs(ratio - common) > 1e-6 * common)) {
        return 0;
      }
      common = ratio;
    }
  }
  return common;
}

// What lies right of the middle: the fall at the start of a run leaves no room to see what tells
// runs apart later. Without curves if that is too little.
Chart second_half(Chart chart) {
  double first = std::numeric_limits<double>::infinity();
  double last = -first;
  for (const Curve& curve : chart.curves) {
    for (const double x : curve.x) {
      first = std::min(first, x);
      last = std::max(last, x);
    }
  }
  const double middle = (first + last) / 2;
  size_t most_rows = 0;
  for (Curve& curve : chart.curves) {
    std::vector<double> x;
    std::vector<double> y;
    for (size_t i = 0; i < curve.x.size(); ++i) {
      if (curve.x[i] >= middle) {
        x.push_back(curve.x[i]);
        y.push_back(curve.y[i]);
      }
    }
    most_rows = std::max(most_rows, x.size());
    curve.x = std::move(x);
    curve.y = std::move(y);
  }
  std::erase_if(chart.curves, [&](const Curve& curve) {
    return most_rows < kLeastRowsOfHalf || curve.x.empty();
  });
  chart.title += ", second half";
  return chart;
}

class Charts {
 public:
  explicit Charts(std::span<const RunRecord> runs) : runs_(runs) {
    const double tokens_per_step = common_tokens_per_step(runs);
    if (tokens_per_step > 0) {
      axis_ = {"step", "tokens", tokens_per_step};
    } else {
      x_ = Metric::kTokens;
      axis_ = {"tokens", "", 0};
    }
    columns_ = std::clamp(kColumnsOfAllRuns / runs.size(), size_t{60}, kChartColumns);
  }

  std::string draw() {
    const Chart loss = loss_chart();
    std::string html =
        draw_chart(loss, axis_, columns_) + draw_chart(second_half(loss), axis_, columns_);
    html += draw_metric("Learning rate", "", Metric::kLr, Scale::kFromZero, 1);
    html += draw_metric("Gradient norm", "before clipping", Metric::kGradNorm, Scale::kLog, 1);
    html += draw_metric("Speed", "tokens/s", Metric::kTokensPerS, Scale::kFromZero, 1);
    html +=
        draw_metric("MFU", "% of the machine's matrix rate", Metric::kMfu, Scale::kFromZero, 100);
    html +=
        draw_metric("Waiting for data", "% of step time", Metric::kDataWait, Scale::kFromZero, 100);
    constexpr double kMib = 1024.0 * 1024;
    html += draw_metric(
        "Peak memory", "MiB resident", Metric::kMemoryBytes, Scale::kFromZero, 1 / kMib);
    return html;
  }

 private:
  Curve curve(const RunRecord& run, Metric metric, double factor) const {
    Curve curve{.name = run.name,
                .colour = static_cast<size_t>(&run - runs_.data()),
                .kind = CurveKind::kLine,
                .x = run.metrics.column(x_),
                .y = run.metrics.column(metric)};
    for (double& value : curve.y) {
      value *= factor;
    }
    return curve;
  }

  Chart loss_chart() const {
    const bool single = runs_.size() == 1;
    Chart chart{.title = "Loss",
                .unit = single ? "nats a token" : "nats a token, smoothed",
                .scale = Scale::kLog,
                .wide = true,
                .curves = {},
                .marks = marks()};
    for (const RunRecord& run : runs_) {
      if (single) {
        chart.curves.push_back(curve(run, Metric::kLoss, 1));
        chart.curves.back().name = "logged steps";
        chart.curves.back().kind = CurveKind::kFaint;
      }
      chart.curves.push_back(curve(run, Metric::kSmoothedLoss, 1));
      chart.curves.back().name = single ? "smoothed" : run.name;
    }
    for (const RunRecord& run : runs_) {
      Curve validation = curve(run, Metric::kValidationLoss, 1);
      if (std::isnan(run.metrics.last(Metric::kValidationLoss))) {
        continue;
      }
      validation.name = single ? "validation" : run.name + ", validation";
      validation.colour = single ? kValidationColour : validation.colour;
      validation.kind = CurveKind::kDots;
      chart.curves.push_back(std::move(validation));
    }
    return chart;
  }

  std::string draw_metric(
      const char* title, const char* unit, Metric metric, Scale scale, double factor) const {
    Chart chart{.title = title,
                .unit = unit,
                .scale = scale,
                .wide = false,
                .curves = {},
                .marks = marks()};
    for (const RunRecord& run : runs_) {
      Curve raw = curve(run, metric, factor);
      raw.name = runs_.size() == 1 ? title : run.name;
      if (metric != Metric::kLr && metric != Metric::kMemoryBytes) {
        add_noisy(std::move(raw), chart);
      } else {
        chart.curves.push_back(std::move(raw));
      }
    }
    return draw_chart(chart, axis_, columns_);
  }

  // A line of means, and behind it, faint, what they are of.
  void add_noisy(Curve raw, Chart& chart) const {
    if (raw.x.size() < 2 * kMeanColumns) {
      chart.curves.push_back(std::move(raw));
      return;
    }
    const Curve means = column_means(raw, kMeanColumns);
    raw.kind = CurveKind::kFaint;
    raw.name = runs_.size() == 1 ? "logged steps" : "";
    chart.curves.push_back(std::move(raw));
    chart.curves.push_back(means);
    if (runs_.size() == 1) {
      chart.curves.back().name = "mean";
    }
  }

  std::vector<Mark> marks() const {
    std::vector<Mark> marks;
    for (const RunRecord& run : runs_) {
      const auto& steps = run.metrics.column(Metric::kStep);
      for (const double step : restart_steps(run)) {
        // Where on the axis the step is that came next.
        const auto next = std::ranges::upper_bound(steps, step);
        if (next != steps.end()) {
          const auto row = static_cast<size_t>(next - steps.begin());
          const size_t colour =
              runs_.size() == 1 ? kRestartColour : static_cast<size_t>(&run - runs_.data());
          marks.push_back({x_ == Metric::kStep ? step : run.metrics.column(x_)[row], colour});
        }
      }
    }
    return marks;
  }

  std::span<const RunRecord> runs_;
  Metric x_ = Metric::kStep;
  Axis axis_;
  size_t columns_ = kChartColumns;
};

}  // namespace

std::string draw_curves(std::span<const RunRecord> runs) {
  Charts charts(runs);
  const std::string drawn = charts.draw();
  std::string html = "<h2>Curves</h2>\n";
  const bool restarted =
      std::ranges::any_of(runs, [](const RunRecord& run) { return run.starts.size() > 1; });
  if (restarted) {
    html += "<p class=\"quiet\">Dashed lines mark where a run was started again.</p>";
  }
  return html + (drawn.empty() ? "<p class=\"quiet\">No step has been logged yet.</p>\n"
                               : "<div class=\"charts\">\n" + drawn + "</div>\n");
}

}  // namespace rwkv
