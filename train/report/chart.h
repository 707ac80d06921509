// Curves over a common axis as a piece of HTML: an SVG that stretches to any width, with its ticks
// as text beside it. Colours come from the page's style sheet (train/report_page.cpp).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace rwkv {

enum class CurveKind {
  kLine,
  kFaint,  // a line behind the others: what is noisy
  kDots,   // a line with a dot at each point: what is rare
};

struct Curve {
  std::string name;   // empty: neither in the legend nor read under the pointer
  size_t colour = 0;  // as of colour_class()
  CurveKind kind = CurveKind::kLine;
  std::vector<double> x;  // rising
  std::vector<double> y;  // as many; what is not finite, or 1e150 and more, is a gap
};

// A place on the x axis that is marked by a line from top to bottom.
struct Mark {
  double x = 0;
  size_t colour = 0;
};

enum class Scale {
  kLinear,
  kFromZero,  // linear, with 0 in the picture
  kLog,       // if all values are above 0 and they span more than a factor of five; else linear
};

struct Chart {
  std::string title;
  std::string unit;
  Scale scale = Scale::kLinear;
  bool wide = false;  // as wide as the page
  std::vector<Curve> curves;
  std::vector<Mark> marks;
};

struct Axis {
  std::string name = "step";  // what x counts
  // A second count that is a multiple of x ("tokens"); none if the name is empty.
  std::string second_name;
  double second_per_x = 0;
};

// `columns`: into how many columns a line is sorted; of each column it keeps the first, the least,
// the greatest and the last value, so that a spike of one step in a million is seen. A chart
// without a finite value is an empty text.
std::string draw_chart(const Chart& chart, const Axis& axis, size_t columns);

// The style sheet's classes for a colour of that number: of eight colours, and from the ninth on
// the same with broken lines; after sixteen it begins anew.
std::string colour_class(size_t colour);

// Positions of ticks from `low` to `high` at 1, 2 or 5 times a power of ten, at most `wanted` + 1
// of them.
std::vector<double> linear_ticks(double low, double high, int wanted);
// The same for a logarithmic axis, 0 < low < high: some multiples of powers of ten, or the powers
// alone, or every n-th of them.
std::vector<double> log_ticks(double low, double high, int wanted);
// The ticks' texts, all with the same decimals and unit of k, M, G, T: "1.5M", "2.0M".
std::vector<std::string> tick_texts(const std::vector<double>& ticks);

// The same curve as means of `columns` stretches of rows, each of as many rows, or one more; of
// fewer rows, each row.
Curve column_means(const Curve& curve, size_t columns);

// Points of a line that are to be drawn, as indices: at most 4 a column and gap.
std::vector<size_t> visible_points(const Curve& curve, double x_low, double x_high, size_t columns);

// Text as HTML shows it; bytes that are not UTF-8, and control characters, become U+FFFD.
std::string escape_html(std::string_view text);

}  // namespace rwkv
