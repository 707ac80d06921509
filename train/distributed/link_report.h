// What lies between the processes of a run, as figures: how fast the operations of training are
// over all of them, and each link from one to another. Measured by link_times.h; judged and shown
// here. No Torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace rwkv {

enum class LinkOperation { kSum, kReduceScatter, kAllGather, kBroadcast, kAgreement };
std::string name_of(LinkOperation operation);

// An operation of all processes.
struct OperationTime {
  LinkOperation operation;
  // Of the tensor whole: what is summed or handed out, or all parts together.
  int64_t bytes = 0;
  double ms = 0;                          // median, of the slowest process
  std::vector<int64_t> wrong_ranks = {};  // whose result is not what it must be
};

// From one process to another, the others being silent.
struct LinkTime {
  int64_t from = 0;
  int64_t to = 0;
  double gb_per_s = 0;    // 10^9 bytes, of LinkReport::link_bytes; the best repeat
  double latency_us = 0;  // there, of a few bytes; the shortest
  bool is_wrong = false;  // other bytes arrived than were sent
  bool operator==(const LinkTime&) const = default;
};

struct LinkReport {
  std::string backend;                // "Gloo, between CPUs"
  std::vector<std::string> machines;  // host name of each rank
  std::vector<OperationTime> operations;
  int64_t link_bytes = 0;
  std::vector<LinkTime> links;  // of all pairs, each in both directions
};

// Bytes of an operation over its time, in 10^9 bytes a second.
double algorithm_gb_per_s(const OperationTime& time);
// The same as what a link carries if each process has one and all are used evenly, which can be
// compared across operations and numbers of processes: times 2 (n - 1) / n for a sum, (n - 1) / n
// for reduce-scatter and all-gather, 1 for a broadcast. Source: nccl-tests, doc/PERFORMANCE.md.
double bus_gb_per_s(const OperationTime& time, int64_t num_processes);

// The slowest link, if it carries less than half of the median of all others; nothing where there
// are no others.
std::optional<LinkTime> slow_link(const std::vector<LinkTime>& links);
bool all_is_right(const LinkReport& report);

// Tables of operations and links, then a line for whatever is slow or wrong.
std::string links_as_text(const LinkReport& report);
std::string links_as_json(const LinkReport& report);

}  // namespace rwkv
