#include <algorithm>
#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "train/report/chart.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;
using testing::SizeIs;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

Chart chart_of(std::vector<double> y, Scale scale = Scale::kLinear) {
  Curve curve{.name = "a", .colour = 0, .kind = CurveKind::kLine, .x = {}, .y = std::move(y)};
  for (size_t i = 0; i < curve.y.size(); ++i) {
    curve.x.push_back(static_cast<double>(i));
  }
  return {.title = "Loss",
          .unit = "nats",
          .scale = scale,
          .wide = false,
          .curves = {curve},
          .marks = {}};
}

TEST(Ticks, AreRound) {
  EXPECT_THAT(linear_ticks(0, 20000, 5), ElementsAre(0, 5000, 10000, 15000, 20000));
  EXPECT_THAT(tick_texts(linear_ticks(1.9, 2.35, 5)),
              ElementsAre("1.9", "2.0", "2.1", "2.2", "2.3"));
  EXPECT_THAT(linear_ticks(3, 3, 5), ElementsAre(3));
}

TEST(Ticks, OfALogarithmicAxisAreFewHoweverWideItIs) {
  EXPECT_THAT(log_ticks(1.3, 7.5, 6), ElementsAre(1.5, 2, 3, 5, 7));
  EXPECT_THAT(log_ticks(0.5, 60, 6), ElementsAre(0.5, 1, 2, 5, 10, 20, 50));
  EXPECT_THAT(log_ticks(1e-30, 1e30, 6), SizeIs(testing::Le(8)));
}

TEST(Ticks, HaveTheSameDecimalsAndUnit) {
  EXPECT_THAT(tick_texts({1.5, 2}), ElementsAre("1.5", "2.0"));
  EXPECT_THAT(tick_texts({0, 50000, 100000}), ElementsAre("0", "50k", "100k"));
  EXPECT_THAT(tick_texts({0, 2500000}), ElementsAre("0", "2.5M"));
  EXPECT_THAT(tick_texts({0.0002, 0.0004}), ElementsAre("0.0002", "0.0004"));
  EXPECT_THAT(tick_texts({2000, 4000}), ElementsAre("2000", "4000"));
}

TEST(VisiblePoints, KeepASpikeOfOneStepInAMillion) {
  Curve curve;
  for (int i = 0; i < 1'000'000; ++i) {
    curve.x.push_back(i);
    curve.y.push_back(i == 654'321 ? 9 : 1);
  }
  const auto points = visible_points(curve, 0, 999'999, 600);
  EXPECT_THAT(points, Contains(654'321));
  EXPECT_LE(points.size(), 2405U);
  EXPECT_EQ(points.front(), 0U);
  EXPECT_EQ(points.back(), 999'999U);
}

TEST(VisiblePoints, OfAShortCurveAreAll) {
  const Curve curve = chart_of({3, 1, 2}).curves[0];
  EXPECT_THAT(visible_points(curve, 0, 2, 600), ElementsAre(0, 1, 2));
}

TEST(ColumnMeans, LeaveOutWhatIsNotThere) {
  const Curve means = column_means(chart_of({1, 3, kNan, 5, kNan, kNan}).curves[0], 3);
  EXPECT_THAT(means.y, ElementsAre(2, 5, testing::IsNan()));
}

TEST(ColumnMeans, AreOfEvenStretches) {
  const Curve curve = chart_of(std::vector<double>(2001, 1)).curves[0];
  const Curve means = column_means(curve, 120);
  ASSERT_EQ(means.x.size(), 120U);
  // x counts rows: 16 or 17 of them lie between one mean and the next, and half as many at the
  // ends.
  EXPECT_NEAR(means.x.front(), 7.5, 0.5);
  EXPECT_NEAR(means.x.back(), 2000 - 7.5, 0.5);
  for (size_t i = 1; i < means.x.size(); ++i) {
    EXPECT_NEAR(means.x[i] - means.x[i - 1], 16.5, 0.5);
  }
  EXPECT_EQ(column_means(curve, 5000).x, curve.x);
}

TEST(DrawnChart, HasWholeNumbersAtItsXTicks) {
  for (const size_t rows : {1, 2, 3, 6}) {
    const std::string html = draw_chart(chart_of(std::vector<double>(rows, 1)), {}, 600);
    EXPECT_THAT(html, HasSubstr("left:100.00%\">" + std::to_string(std::max<size_t>(rows - 1, 1))));
    EXPECT_THAT(html, Not(testing::ContainsRegex("left:-?[0-9.]*%\">[0-9]*\\.")));
  }
}

TEST(DrawnChart, RunsFromCornerToCorner) {
  // 4 % above and below, and y counts from the top.
  EXPECT_THAT(draw_chart(chart_of({1, 2}), {}, 600), HasSubstr("d=\"M0 9629.6L10000 370.4\""));
}

TEST(DrawnChart, BreaksALineWhereAValueIsMissing) {
  const std::string html = draw_chart(chart_of({1, 1, kNan, 2, 2}), {}, 600);
  EXPECT_THAT(html, HasSubstr("d=\"M0 9629.6L2500 9629.6M7500 370.4L10000 370.4\""));
}

TEST(DrawnChart, JoinsRareDots) {
  Chart chart = chart_of({1, kNan, 2});
  chart.curves[0].kind = CurveKind::kDots;
  const std::string html = draw_chart(chart, {}, 600);
  EXPECT_THAT(html,
              AllOf(HasSubstr("d=\"M0 9629.6L10000 370.4\""), HasSubstr("h0M10000 370.4h0\"")));
}

TEST(DrawnChart, IsLogarithmicWhereThatHelps) {
  EXPECT_THAT(draw_chart(chart_of({1, 100}, Scale::kLog), {}, 600), HasSubstr("data-log=\"1\""));
  EXPECT_THAT(draw_chart(chart_of({1, 2}, Scale::kLog), {}, 600), HasSubstr("data-log=\"0\""));
  EXPECT_THAT(draw_chart(chart_of({0, 100}, Scale::kLog), {}, 600), HasSubstr("data-log=\"0\""));
}

TEST(DrawnChart, OfZerosStandsOnItsAxis) {
  EXPECT_THAT(draw_chart(chart_of({0, 0}, Scale::kFromZero), {}, 600),
              HasSubstr("d=\"M0 10000L10000 10000\""));
}

TEST(DrawnChart, WithoutANumberIsNothing) {
  EXPECT_EQ(draw_chart(chart_of({kNan, std::numeric_limits<double>::infinity(), 1e308}), {}, 600),
            "");
  EXPECT_EQ(draw_chart(chart_of({}), {}, 600), "");
}

TEST(DrawnChart, OfOneValueHasNoPlaceThatIsNotANumber) {
  for (const double value : {0.0, 5.0, -5.0, 1e140, 5e-324}) {
    EXPECT_THAT(draw_chart(chart_of({value}, Scale::kFromZero), {}, 600), Not(HasSubstr("nan")));
    EXPECT_THAT(draw_chart(chart_of({value, value}, Scale::kLog), {}, 600), Not(HasSubstr("nan")));
  }
}

TEST(EscapedHtml, HoldsNothingThatHtmlReads) {
  EXPECT_EQ(escape_html("<a href=\"x\">'&"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;");
  EXPECT_EQ(escape_html("a\x01\xff\n"), "a\xef\xbf\xbd\xef\xbf\xbd\n");
}

TEST(Ticks, AreFewHoweverCloseOrFarTheValues) {
  const double loss = 5.545177459716797;
  EXPECT_LE(linear_ticks(loss, std::nextafter(loss, 6), 5).size(), 6u);
  EXPECT_LE(linear_ticks(1e300, 1.0000000000000002e300, 5).size(), 6u);
  for (const std::vector<double>& y : {std::vector{loss, std::nextafter(loss, 6), loss},
                                       std::vector{1e-200, 1e140, 1.0},
                                       std::vector{1e-310, 1e-300, 1e149}}) {
    for (const Scale scale : {Scale::kLinear, Scale::kLog, Scale::kFromZero}) {
      const std::string svg = draw_chart({.title = "t",
                                          .unit = "",
                                          .scale = scale,
                                          .curves = {{.name = "c", .x = {1, 2, 3}, .y = y}},
                                          .marks = {}},
                                         {},
                                         100);
      EXPECT_LT(svg.size(), 10'000u);
    }
  }
}

}  // namespace
}  // namespace rwkv
