#include "train/distributed/link_report.h"

#include <algorithm>
#include <array>
#include <string_view>

#include <nlohmann/json.hpp>
#include <spdlog/fmt/fmt.h>
#include <spdlog/fmt/ranges.h>

namespace rwkv {
namespace {

// A slower link is named: noise of a busy machine stays above it.
constexpr double kSlowPart = 0.5;

double median_of(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
}

// Of all links but `one`.
double median_of_others(const std::vector<LinkTime>& links, const LinkTime& one) {
  std::vector<double> others;
  for (const LinkTime& link : links) {
    if (link.from != one.from || link.to != one.to) {
      others.push_back(link.gb_per_s);
    }
  }
  return median_of(others);
}

std::string size_text(int64_t bytes) {
  return bytes >= 1 << 20   ? fmt::format("{} MiB", bytes >> 20)
         : bytes >= 1 << 10 ? fmt::format("{} KiB", bytes >> 10)
                            : fmt::format("{} B", bytes);
}

std::string rank_text(const LinkReport& report, int64_t rank) {
  return fmt::format("rank {} ({})", rank, report.machines[static_cast<size_t>(rank)]);
}

// A number for each link: the sender's row, the receiver's column.
template <typename Figure>
std::string matrix(const LinkReport& report, const char* title, const Figure& figure) {
  std::string text = fmt::format("\n{:<12}", title);
  for (size_t to = 0; to < report.machines.size(); ++to) {
    text += fmt::format("{:>9}", fmt::format("to {}", to));
  }
  std::vector<std::string> cells(report.machines.size() * report.machines.size(), "-");
  for (const LinkTime& link : report.links) {
    cells[static_cast<size_t>(link.from) * report.machines.size() + static_cast<size_t>(link.to)] =
        figure(link);
  }
  for (size_t i = 0; i < cells.size(); ++i) {
    const size_t from = i / report.machines.size();
    text += i % report.machines.size() == 0 ? fmt::format("\n{:<12}", fmt::format("from {}", from))
                                            : "";
    text += fmt::format("{:>9}", cells[i]);
  }
  return text + "\n";
}

std::string findings(const LinkReport& report) {
  std::string text;
  for (const OperationTime& time : report.operations) {
    for (const int64_t rank : time.wrong_ranks) {
      text += fmt::format(
          "{}: the {} of {} came to wrong numbers; do not train with it: look at its memory, its "
          "GPU and its network card\n",
          rank_text(report, rank),
          name_of(time.operation),
          size_text(time.bytes));
    }
  }
  for (const LinkTime& link : report.links) {
    if (link.is_wrong) {
      text += fmt::format(
          "{} got other bytes than {} sent; do not train over this link: look at the memory and "
          "the network cards of both\n",
          rank_text(report, link.to),
          rank_text(report, link.from));
    }
  }
  if (const auto link = slow_link(report.links)) {
    text += fmt::format(
        "the link from {} to {} is slow: {:.3g} GB/s, where the median of the others is {:.3g}; "
        "all wait for it in every step: look at its cable, its switch port and who else uses "
        "it or these machines\n",
        rank_text(report, link->from),
        rank_text(report, link->to),
        link->gb_per_s,
        median_of_others(report.links, *link));
  }
  return text;
}

}  // namespace

std::string name_of(LinkOperation operation) {
  constexpr std::array<std::string_view, 5> kNames{
      "sum", "reduce-scatter", "all-gather", "broadcast", "agreement"};
  return std::string(kNames[static_cast<size_t>(operation)]);
}

double algorithm_gb_per_s(const OperationTime& time) {
  return static_cast<double>(time.bytes) / time.ms / 1e6;
}

double bus_gb_per_s(const OperationTime& time, int64_t num_processes) {
  const auto n = static_cast<double>(num_processes);
  switch (time.operation) {
    case LinkOperation::kSum:
    case LinkOperation::kAgreement:
      return algorithm_gb_per_s(time) * 2 * (n - 1) / n;
    case LinkOperation::kReduceScatter:
    case LinkOperation::kAllGather:
      return algorithm_gb_per_s(time) * (n - 1) / n;
    case LinkOperation::kBroadcast:
      break;
  }
  return algorithm_gb_per_s(time);
}

std::optional<LinkTime> slow_link(const std::vector<LinkTime>& links) {
  if (links.size() < 2) {
    return std::nullopt;
  }
  const LinkTime& slowest = *std::ranges::min_element(links, {}, &LinkTime::gb_per_s);
  return slowest.gb_per_s < kSlowPart * median_of_others(links, slowest) ? std::optional(slowest)
                                                                         : std::nullopt;
}

bool all_is_right(const LinkReport& report) {
  return std::ranges::all_of(
             report.operations, &std::vector<int64_t>::empty, &OperationTime::wrong_ranks) &&
         std::ranges::none_of(report.links, &LinkTime::is_wrong);
}

std::string links_as_text(const LinkReport& report) {
  const auto num_processes = static_cast<int64_t>(report.machines.size());
  std::string text = fmt::format("{} processes, {}\n\n{:<16}{:>10}{:>12}{:>18}{:>12}\n",
                                 num_processes,
                                 report.backend,
                                 "operation",
                                 "size",
                                 "ms",
                                 "algorithm GB/s",
                                 "bus GB/s");
  for (const OperationTime& time : report.operations) {
    text += fmt::format(
        "{:<16}{:>10}{:>12.3f}", name_of(time.operation), size_text(time.bytes), time.ms);
    // A few bytes say nothing of a bandwidth.
    text += time.operation == LinkOperation::kAgreement
                ? "\n"
                : fmt::format("{:>18.3f}{:>12.3f}\n",
                              algorithm_gb_per_s(time),
                              bus_gb_per_s(time, num_processes));
  }
  text += matrix(
      report, "GB/s", [](const LinkTime& link) { return fmt::format("{:.3g}", link.gb_per_s); });
  text += matrix(report, "latency, us", [](const LinkTime& link) {
    return fmt::format("{:.3g}", link.latency_us);
  });
  const std::string found = findings(report);
  return text + "\n" + (found.empty() ? "all results are right, no link is slow\n" : found);
}

std::string links_as_json(const LinkReport& report) {
  nlohmann::ordered_json json = {{"all_is_right", all_is_right(report)},
                                 {"backend", report.backend},
                                 {"machines", report.machines},
                                 {"operations", nlohmann::ordered_json::array()},
                                 {"link_bytes", report.link_bytes},
                                 {"links", nlohmann::ordered_json::array()},
                                 {"slow_link", nullptr}};
  const auto num_processes = static_cast<int64_t>(report.machines.size());
  for (const OperationTime& time : report.operations) {
    json["operations"].push_back({{"operation", name_of(time.operation)},
                                  {"bytes", time.bytes},
                                  {"ms", time.ms},
                                  {"algorithm_gb_per_s", algorithm_gb_per_s(time)},
                                  {"bus_gb_per_s", bus_gb_per_s(time, num_processes)},
                                  {"wrong_ranks", time.wrong_ranks}});
  }
  for (const LinkTime& link : report.links) {
    json["links"].push_back({{"from", link.from},
                             {"to", link.to},
                             {"gb_per_s", link.gb_per_s},
                             {"latency_us", link.latency_us},
                             {"is_wrong", link.is_wrong}});
  }
  if (const auto link = slow_link(report.links)) {
    json["slow_link"] = {{"from", link->from}, {"to", link->to}};
  }
  return json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace rwkv
