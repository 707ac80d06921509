#include "train/report/chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string_view>

#include <fmt/format.h>

#include "data/utf8.h"
#include "train/metrics.h"

namespace rwkv {
namespace {

// Coordinates of the SVG's own, and the parts of one that points are rounded to: fine enough that
// the steps of a run of a million, and four digits of a value, can be read back.
constexpr double kExtent = 10000;
constexpr double kPartsOfX = 1000;
constexpr double kPartsOfY = 10;
// Below that a logarithmic axis shows no more than a linear one.
constexpr double kLeastLogRatio = 5;
constexpr size_t kNumColours = 8;
// Up to there a text at an x tick, in the middle of it, would lie over the axis's name.
constexpr double kBesideName = 0.04;
// From there on differences and ratios may overflow: no more shown than infinity is.
constexpr double kBeyond = 1e150;

// One axis: values to 0 .. 1.
struct Range {
  double low = 0;
  double high = 1;
  bool log = false;

  double place(double value) const {
    return log ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
  }
};

struct Extremes {
  double low = std::numeric_limits<double>::infinity();
  double high = -std::numeric_limits<double>::infinity();

  void add(double value) {
    low = std::min(low, value);
    high = std::max(high, value);
  }
};

bool is_shown(const Curve& curve, size_t i) {
  return std::abs(curve.x[i]) < kBeyond && std::abs(curve.y[i]) < kBeyond;
}

Range range_of_x(const Chart& chart) {
  Extremes extremes;
  for (const Curve& curve : chart.curves) {
    for (size_t i = 0; i < curve.x.size(); ++i) {
      if (is_shown(curve, i)) {
        extremes.add(curve.x[i]);
      }
    }
  }
  // From the start of the run, unless only a late part of it is there.
  if (extremes.low > 0 && extremes.low < 0.2 * extremes.high) {
    extremes.low = 0;
  }
  return {extremes.low, std::max(extremes.high, extremes.low + 1), false};
}

Range range_of_y(const Chart& chart) {
  Extremes extremes;
  for (const Curve& curve : chart.curves) {
    for (size_t i = 0; i < curve.y.size(); ++i) {
      if (is_shown(curve, i)) {
        extremes.add(curve.y[i]);
      }
    }
  }
  auto [low, high] = extremes;
  if (chart.scale == Scale::kLog && low > 1 / kBeyond && high / low > kLeastLogRatio) {
    const double margin = std::pow(high / low, 0.04);
    return {low / margin, high * margin, true};
  }
  if (chart.scale == Scale::kFromZero) {
    low = std::min(low, 0.0);
    high = std::max(high, 0.0);
  }
  if (chart.scale == Scale::kFromZero && low == 0 && high == 0) {
    return {0, 1, false};
  }
  // Nearer than that no tick can be told from the next.
  if (!(high - low > 1e-9 * std::max(std::abs(low), std::abs(high)))) {
    const double half = low == 0 ? 1 : std::max(std::abs(low) / 2, 1e-300);
    return {low - half, high + half, false};
  }
  const double margin = 0.04 * (high - low);
  const bool touches_zero = chart.scale == Scale::kFromZero && low == 0;
  return {touches_zero ? 0 : low - margin, high + margin, false};
}

std::string path_of(const Curve& curve, const Range& x, const Range& y, size_t columns) {
  std::string path;
  bool pen_down = false;
  size_t previous = 0;
  for (const size_t i : visible_points(curve, x.low, x.high, columns)) {
    // A gap in the values is a gap in a line; rare points are joined all the same.
    for (size_t j = previous; pen_down && curve.kind != CurveKind::kDots && j < i; ++j) {
      pen_down = is_shown(curve, j);
    }
    path += fmt::format("{}{} {}",
                        pen_down ? 'L' : 'M',
                        std::round(kExtent * x.place(curve.x[i]) * kPartsOfX) / kPartsOfX,
                        std::round(kExtent * (1 - y.place(curve.y[i])) * kPartsOfY) / kPartsOfY);
    pen_down = true;
    previous = i;
  }
  return path;
}

std::string_view class_of(CurveKind kind) {
  switch (kind) {
    case CurveKind::kFaint:
      return "faint";
    case CurveKind::kDots:
      return "dots";
    default:
      return "line";
  }
}

std::string draw_curve(const Curve& curve, const Range& x, const Range& y, size_t columns) {
  const std::string path = path_of(curve, x, y, columns);
  const std::string colour = colour_class(curve.colour);
  const std::string name =
      curve.name.empty() ? "" : " data-name=\"" + escape_html(curve.name) + "\"";
  std::string svg =
      fmt::format(R"(<path class="{} {}"{} d="{}"/>)", class_of(curve.kind), colour, name, path);
  // A line of no length with round ends is a dot that stays round however the picture is stretched.
  if (curve.kind == CurveKind::kDots || path.find('L') == path.npos) {
    std::string dots;
    for (const char c : path) {
      dots += c == 'L' ? "h0M" : std::string(1, c);
    }
    svg += fmt::format(R"(<path class="dot {}" d="{}h0"/>)", colour, dots);
  }
  return svg;
}

std::string second_text(const Axis& axis, double x) {
  const double value = std::abs(x * axis.second_per_x);
  return axis.second_name.empty() || value > 1e18
             ? ""
             : "<i>" + format_count(std::llround(value)) + "</i>";
}

// Lines behind the curves, and the texts at the ticks, which are no part of the stretched picture.
struct Frame {
  std::string svg;
  std::string texts;
};

Frame draw_frame(const Range& x, const Range& y, const Chart& chart, const Axis& axis) {
  // Of steps there are no parts.
  const int most_ticks = static_cast<int>(std::min(x.high - x.low, 7.0));
  const std::vector<double> x_ticks = linear_ticks(x.low, x.high, most_ticks);
  const std::vector<double> y_ticks =
      y.log ? log_ticks(y.low, y.high, 6) : linear_ticks(y.low, y.high, 6);
  std::string lines;
  for (const double tick : y_ticks) {
    lines += fmt::format("M0 {:.0f}h10000", kExtent * (1 - y.place(tick)));
  }
  std::string svg = fmt::format(R"(<path class="grid" d="{}"/>)", lines);
  for (const Mark& mark : chart.marks) {
    if (mark.x > x.low && mark.x <= x.high) {
      svg += fmt::format(R"(<path class="mark {}" d="M{:.0f} 0v10000"/>)",
                         colour_class(mark.colour),
                         kExtent * x.place(mark.x));
    }
  }
  std::string texts;
  std::vector<std::string> y_texts = tick_texts(y_ticks);
  for (size_t i = 0; i < y_ticks.size(); ++i) {
    if (y.log) {
      y_texts[i] = tick_texts({y_ticks[i]})[0];
    }
    texts += fmt::format(R"(<span class="y" style="top:{:.2f}%">{}</span>)",
                         100 * (1 - y.place(y_ticks[i])),
                         y_texts[i]);
  }
  const std::vector<std::string> x_texts = tick_texts(x_ticks);
  for (size_t i = 0; i < x_ticks.size(); ++i) {
    const double place = x.place(x_ticks[i]);
    texts += fmt::format(R"(<span class="x{}{}" style="left:{:.2f}%">{}{}</span>)",
                         i % 2 == 1 ? " odd" : "",
                         place < kBesideName ? " start" : "",
                         100 * place,
                         x_texts[i],
                         second_text(axis, x_ticks[i]));
  }
  texts += fmt::format(R"(<span class="axis">{}<i>{}</i></span>)",
                       escape_html(axis.name),
                       escape_html(axis.second_name));
  return {svg, texts};
}

std::string legend_of(const Chart& chart) {
  std::string items;
  if (chart.curves.size() == 1) {
    return items;  // the title says it
  }
  for (const Curve& curve : chart.curves) {
    if (curve.name.empty()) {
      continue;
    }
    items += fmt::format(R"(<span class="key {} {}">{}</span>)",
                         class_of(curve.kind),
                         colour_class(curve.colour),
                         escape_html(curve.name));
  }
  return items;
}

}  // namespace

std::string draw_chart(const Chart& chart, const Axis& axis, size_t columns) {
  const bool any = std::ranges::any_of(chart.curves, [](const Curve& curve) {
    for (size_t i = 0; i < curve.y.size(); ++i) {
      if (is_shown(curve, i)) {
        return true;
      }
    }
    return false;
  });
  if (!any) {
    return "";
  }
  const Range x = range_of_x(chart);
  const Range y = range_of_y(chart);
  const Frame frame = draw_frame(x, y, chart, axis);
  std::string svg = frame.svg;
  for (const Curve& curve : chart.curves) {
    svg += draw_curve(curve, x, y, columns);
  }
  return fmt::format(
      "<figure class=\"chart{}\"><figcaption><b>{}</b> <span "
      "class=\"unit\">{}{}</span>{}</figcaption>"
      "<div class=\"plot\" data-x0=\"{}\" data-x1=\"{}\" data-y0=\"{}\" data-y1=\"{}\" "
      "data-log=\"{}\" "
      "data-x=\"{}\" data-second=\"{}\" data-ratio=\"{}\">"
      "<svg viewBox=\"0 0 10000 10000\" preserveAspectRatio=\"none\" role=\"img\" "
      "aria-label=\"{}\">{}</svg>{}</div></figure>\n",
      chart.wide ? " wide" : "",
      escape_html(chart.title),
      escape_html(chart.unit),
      y.log ? ", logarithmic" : "",
      legend_of(chart),
      x.low,
      x.high,
      y.low,
      y.high,
      y.log ? 1 : 0,
      escape_html(axis.name),
      escape_html(axis.second_name),
      axis.second_per_x,
      escape_html(chart.title + " over " + axis.name),
      svg,
      frame.texts);
}

std::string colour_class(size_t colour) {
  return fmt::format("c{}{}", colour % kNumColours, colour / kNumColours % 2 == 1 ? " broken" : "");
}

std::vector<double> linear_ticks(double low, double high, int wanted) {
  if (!(high > low)) {
    return {low};
  }
  const double rough = (high - low) / wanted;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  const double ratio = rough / power;
  const double step = power * (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10);
  std::vector<double> ticks;
  // Each from its number, so that errors do not add up; the bounds give way by a rounding. Where
  // numbers are so far from zero that the step is lost in them, there are no more than wanted.
  const double first = std::ceil(low / step - 1e-9);
  const double last = std::floor(high / step + 1e-9);
  for (int i = 0; first + i <= last && i <= wanted; ++i) {
    ticks.push_back((first + i) * step);
  }
  return ticks;
}

std::vector<double> log_ticks(double low, double high, int wanted) {
  const double decades = std::log10(high / low);
  // As fine a division of a decade as keeps about to the number wanted.
  std::vector<double> factors = {1};
  if (decades < 1) {
    factors = {1, 1.5, 2, 3, 5, 7};
  } else if (3 * decades <= 1.5 * wanted) {
    factors = {1, 2, 5};
  }
  const auto every = static_cast<int>(std::max(1.0, std::ceil(decades / wanted)));
  const auto first = static_cast<int>(std::floor(std::log10(low)));
  std::vector<double> ticks;
  for (int power = first; power <= std::log10(high); ++power) {
    for (const double factor : factors) {
      const double tick = factor * std::pow(10.0, power);
      if (power % every == 0 && tick >= low && tick <= high) {
        ticks.push_back(tick);
      }
    }
  }
  return ticks.size() < 2 ? linear_ticks(low, high, wanted) : ticks;
}

std::vector<std::string> tick_texts(const std::vector<double>& ticks) {
  double greatest = 0;
  for (const double tick : ticks) {
    greatest = std::max(greatest, std::abs(tick));
  }
  double unit = 1;
  std::string_view letter = "";
  for (const std::string_view next : {"k", "M", "G", "T"}) {
    if (greatest >= 10000 * unit || (greatest >= 1e6 && greatest >= 1000 * unit)) {
      unit *= 1000;
      letter = next;
    }
  }
  // As many decimals as tell each tick from its rounding.
  int decimals = 0;
  for (; decimals < 4; ++decimals) {
    const double scale = std::pow(10.0, decimals) / unit;
    if (std::ranges::all_of(ticks, [&](double tick) {
          return std::abs(tick * scale - std::round(tick * scale)) <
                 1e-6 * (1 + std::abs(tick * scale));
        })) {
      break;
    }
  }
  std::vector<std::string> texts;
  for (const double tick : ticks) {
    if (tick == 0) {
      texts.emplace_back("0");
    } else if (decimals == 4) {
      texts.push_back(fmt::format("{:g}", tick));
    } else {
      texts.push_back(fmt::format("{:.{}f}{}", tick / unit, decimals, letter));
    }
  }
  return texts;
}

Curve column_means(const Curve& curve, size_t columns) {
  Curve means{
      .name = curve.name, .colour = curve.colour, .kind = CurveKind::kLine, .x = {}, .y = {}};
  const size_t rows = curve.x.size();
  const size_t stretches = std::min(rows, columns);
  for (size_t stretch = 0; stretch < stretches; ++stretch) {
    // Evenly, so that no mean is of far fewer rows than its neighbours, and jumps.
    const size_t begin = stretch * rows / stretches;
    const size_t end = (stretch + 1) * rows / stretches;
    double x = 0;
    double y = 0;
    double number = 0;
    for (size_t i = begin; i < end; ++i) {
      if (is_shown(curve, i)) {
        x += curve.x[i];
        y += curve.y[i];
        ++number;
      }
    }
    means.x.push_back(number > 0 ? x / number : curve.x[begin]);
    means.y.push_back(number > 0 ? y / number : std::numeric_limits<double>::quiet_NaN());
  }
  return means;
}

std::vector<size_t> visible_points(const Curve& curve,
                                   double x_low,
                                   double x_high,
                                   size_t columns) {
  std::vector<size_t> points;
  const double width = (x_high - x_low) / static_cast<double>(columns);
  const auto column_of = [&](size_t i) { return std::floor((curve.x[i] - x_low) / width); };
  for (size_t begin = 0; begin < curve.x.size();) {
    if (!is_shown(curve, begin)) {
      ++begin;
      continue;
    }
    size_t least = begin;
    size_t greatest = begin;
    size_t end = begin + 1;
    for (; end < curve.x.size() && is_shown(curve, end) && column_of(end) == column_of(begin);
         ++end) {
      least = curve.y[end] < curve.y[least] ? end : least;
      greatest = curve.y[end] > curve.y[greatest] ? end : greatest;
    }
    std::array<size_t, 4> kept = {begin, least, greatest, end - 1};
    std::ranges::sort(kept);
    points.insert(points.end(), kept.begin(), std::unique(kept.begin(), kept.end()));
    begin = end;
  }
  return points;
}

std::string escape_html(std::string_view text) {
  std::string html;
  for (const char c : replace_malformed_utf8(text)) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '&') {
      html += "&amp;";
    } else if (c == '<') {
      html += "&lt;";
    } else if (c == '>') {
      html += "&gt;";
    } else if (c == '"') {
      html += "&quot;";
    } else if (c == '\'') {
      html += "&#39;";
    } else if ((byte < 0x20 && c != '\n' && c != '\t') || byte == 0x7f) {
      html += "\xef\xbf\xbd";
    } else {
      html += c;
    }
  }
  return html;
}

}  // namespace rwkv
