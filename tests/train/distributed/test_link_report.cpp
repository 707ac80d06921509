#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "train/distributed/link_report.h"

namespace rwkv {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// Every link between as many processes, all of one speed.
std::vector<LinkTime> even_links(int64_t count) {
  std::vector<LinkTime> links;
  for (int64_t from = 0; from < count; ++from) {
    for (int64_t to = 0; to < count; ++to) {
      if (from != to) {
        links.push_back({.from = from, .to = to, .gb_per_s = 10, .latency_us = 5});
      }
    }
  }
  return links;
}

LinkReport even_report() {
  return {.backend = "Gloo, between CPUs",
          .machines = {"node01", "node01", "node02"},
          .operations = {{.operation = LinkOperation::kSum, .bytes = 1 << 20, .ms = 2},
                         {.operation = LinkOperation::kAgreement, .bytes = 63, .ms = 0.1}},
          .link_bytes = 16 << 20,
          .links = even_links(3)};
}

TEST(LinkReport, CountsBandwidthAsNcclDoes) {
  const auto time = [](LinkOperation operation) {
    return OperationTime{.operation = operation, .bytes = 8'000'000, .ms = 4};
  };
  EXPECT_DOUBLE_EQ(algorithm_gb_per_s(time(LinkOperation::kSum)), 2);
  EXPECT_DOUBLE_EQ(bus_gb_per_s(time(LinkOperation::kSum), 4), 3);
  EXPECT_DOUBLE_EQ(bus_gb_per_s(time(LinkOperation::kSum), 2), 2);
  EXPECT_DOUBLE_EQ(bus_gb_per_s(time(LinkOperation::kReduceScatter), 4), 1.5);
  EXPECT_DOUBLE_EQ(bus_gb_per_s(time(LinkOperation::kAllGather), 4), 1.5);
  EXPECT_DOUBLE_EQ(bus_gb_per_s(time(LinkOperation::kBroadcast), 4), 2);
}

TEST(LinkReport, NamesALinkBelowHalfOfTheOthers) {
  std::vector<LinkTime> links = even_links(3);
  EXPECT_EQ(slow_link(links), std::nullopt);
  links[3].gb_per_s = 5;
  EXPECT_EQ(slow_link(links), std::nullopt);
  links[3].gb_per_s = 4.9;
  ASSERT_NE(slow_link(links), std::nullopt);
  EXPECT_EQ(*slow_link(links), links[3]);
  // Of two directions, too; of nothing there are no others.
  EXPECT_EQ(
      slow_link({{.from = 0, .to = 1, .gb_per_s = 10}, {.from = 1, .to = 0, .gb_per_s = 4}})->from,
      1);
  EXPECT_EQ(slow_link({}), std::nullopt);
}

TEST(LinkReport, SaysThatAllIsWell) {
  const LinkReport report = even_report();
  EXPECT_TRUE(all_is_right(report));
  EXPECT_EQ(links_as_text(report),
            "3 processes, Gloo, between CPUs\n\n"
            "operation             size          ms    algorithm GB/s    bus GB/s\n"
            "sum                  1 MiB       2.000             0.524       0.699\n"
            "agreement             63 B       0.100\n\n"
            "GB/s             to 0     to 1     to 2\n"
            "from 0              -       10       10\n"
            "from 1             10        -       10\n"
            "from 2             10       10        -\n\n"
            "latency, us      to 0     to 1     to 2\n"
            "from 0              -        5        5\n"
            "from 1              5        -        5\n"
            "from 2              5        5        -\n\n"
            "all results are right, no link is slow\n");
}

TEST(LinkReport, NamesWhoIsWrongAndWhatIsSlow) {
  LinkReport report = even_report();
  report.operations[0].wrong_ranks = {2};
  EXPECT_FALSE(all_is_right(report));
  EXPECT_THAT(links_as_text(report),
              AllOf(HasSubstr("rank 2 (node02): the sum of 1 MiB came to wrong numbers"),
                    Not(HasSubstr("all results are right"))));
  report = even_report();
  report.links[1].is_wrong = true;
  EXPECT_FALSE(all_is_right(report));
  EXPECT_THAT(links_as_text(report),
              HasSubstr("rank 2 (node02) got other bytes than rank 0 (node01) sent"));
  report = even_report();
  report.links[5].gb_per_s = 1;
  EXPECT_TRUE(all_is_right(report));
  EXPECT_THAT(links_as_text(report),
              HasSubstr("the link from rank 2 (node02) to rank 1 (node01) is slow: 1 GB/s, where "
                        "the median of the others is 10;"));
  const auto json = nlohmann::json::parse(links_as_json(report));
  EXPECT_EQ(json["slow_link"], (nlohmann::json{{"from", 2}, {"to", 1}}));
  EXPECT_EQ(json["operations"][0]["bus_gb_per_s"], bus_gb_per_s(report.operations[0], 3));
}

}  // namespace
}  // namespace rwkv
