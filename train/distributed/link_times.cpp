#include "train/distributed/link_times.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <utility>

#include <ATen/ATen.h>

#include <spdlog/fmt/fmt.h>
#include <unistd.h>

#include "train/bench/bench.h"

namespace rwkv {
namespace {

constexpr int64_t kSizes[] = {
    int64_t{64} << 10, int64_t{1} << 20, int64_t{16} << 20, int64_t{100} << 20};
constexpr int64_t kLinkBytes = int64_t{16} << 20;
// Enough for a median; of large ones fewer, for each takes a tenth of a second on a slow network.
constexpr int64_t kRepeats = 20;
constexpr int64_t kLargeRepeats = 5;
constexpr int64_t kLargeBytes = int64_t{16} << 20;
// At links that seem slow.
constexpr int64_t kSecondLooks = 3;
constexpr int64_t kWarmUp = 2;
// Numbers repeat with a period that no power of two divides, so that a piece in another's place
// shows; and are small, so that their sums are exact in fp32 in any order.
constexpr int64_t kPeriod = 13;
constexpr int64_t kScales = 16;

double scale_of(int64_t rank) {
  return static_cast<double>(rank % kScales + 1);
}

class LinkTimer {
 public:
  LinkTimer(Communicator& communicator, const LinkSettings& settings)
      : all_(communicator), runtime_(settings.runtime), max_bytes_(settings.max_bytes) {}

  OperationTime time(LinkOperation operation, int64_t bytes) {
    const int64_t n = all_.world_size();
    // Whole parts for all.
    const int64_t count = std::max<int64_t>(bytes / 4 / n, 1) * n;
    const at::Tensor pattern = pattern_of(count);
    const auto own = [&](const at::Tensor& whole) {
      return whole.slice(0, all_.rank() * (count / n), (all_.rank() + 1) * (count / n));
    };
    const at::Tensor whole = at::empty_like(pattern);
    at::Tensor result = whole;
    at::Tensor expected = pattern;
    double sum_of_scales = 0;
    for (int64_t rank = 0; rank < n; ++rank) {
      sum_of_scales += scale_of(rank);
    }
    std::function<void()> prepare;
    std::function<void()> work;
    switch (operation) {
      case LinkOperation::kSum:
        prepare = [&] { whole.copy_(pattern).mul_(own_scale()); };
        work = [&] { all_.sum(whole, "the timing of a sum"); };
        expected = pattern * sum_of_scales;
        break;
      case LinkOperation::kReduceScatter:
        prepare = [&] { whole.copy_(pattern).mul_(own_scale()); };
        result = own(whole);
        work = [&] {
          all_.begin_reduce_scatter(whole, result, "the timing of a reduce-scatter")->wait();
        };
        expected = own(pattern) * sum_of_scales;
        break;
      case LinkOperation::kAllGather:
        prepare = [&] {
          whole.zero_();
          own(whole).copy_(own(pattern));
        };
        work = [&] {
          all_.begin_all_gather(own(whole), whole, "the timing of an all-gather")->wait();
        };
        break;
      case LinkOperation::kBroadcast:
        // In training the first hands out.
        prepare = [&] { all_.rank() == 0 ? whole.copy_(pattern) : whole.zero_(); };
        work = [&] { all_.broadcast(whole, 0, "the timing of a broadcast"); };
        break;
      case LinkOperation::kAgreement:
        return time_agreement();
    }
    OperationTime time{.operation = operation, .bytes = 4 * count};
    time.ms = median_of_slowest(repeats_of(bytes), prepare, work);
    time.wrong_ranks = ranks_that(!result.equal(expected));
    return time;
  }

  LinkTime time_link(int64_t from, int64_t to) {
    constexpr const char* kWhat = "the timing of a link";
    const at::Tensor pattern = pattern_of(link_bytes() / 4);
    const at::Tensor data = at::zeros_like(pattern);
    const at::Tensor ping = at::zeros({1}, pattern.options());
    const bool is_sender = all_.rank() == from;
    const auto exchange = [&](const at::Tensor& tensor) {
      if (is_sender) {
        all_.send(tensor, to, kWhat);
        all_.receive(ping, to, kWhat);
      } else {
        all_.receive(tensor, from, kWhat);
        all_.send(ping, from, kWhat);
      }
    };
    int64_t there_and_back_ns = 0;
    int64_t data_ns = 0;
    bool is_wrong = false;
    if (is_sender || all_.rank() == to) {
      const auto times_of = [&](int64_t repeats, const at::Tensor& tensor) {
        return time_repeated(kWarmUp, repeats, [&] { exchange(tensor), finish(); });
      };
      if (is_sender) {
        data.copy_(pattern);
      }
      // The shortest: where cores are busy, processes wait for their turn, which is not the link's
      // doing. A slow link is slow in every repeat; one that is so now and then cannot be told from
      // busy cores.
      there_and_back_ns = std::llround(1e6 * times_of(kRepeats, ping).min);
      data_ns = std::llround(1e6 * times_of(repeats_of(link_bytes()), data).min);
      is_wrong = !data.equal(pattern);
    }
    const auto at_sender = [&](int64_t value) {
      return static_cast<double>(all_.values_of_all(value, kWhat)[static_cast<size_t>(from)]);
    };
    const double latency_ns = at_sender(there_and_back_ns) / 2;
    // The answer is no part of it; both ways were there, so that something is left.
    const double ns = at_sender(data_ns) - latency_ns;
    return {.from = from,
            .to = to,
            .gb_per_s = static_cast<double>(link_bytes()) / ns,
            .latency_us = latency_ns / 1e3,
            .is_wrong = !ranks_that(is_wrong).empty()};
  }

  int64_t link_bytes() const { return std::min(kLinkBytes, max_bytes_); }

 private:
  double own_scale() const { return scale_of(all_.rank()); }
  at::Tensor pattern_of(int64_t count) const {
    const at::Device device = runtime_ == nullptr ? at::kCPU : runtime_->device();
    return at::arange(count, at::TensorOptions(device).dtype(at::kLong))
        .remainder(kPeriod)
        .add(1)
        .to(at::kFloat);
  }
  static int64_t repeats_of(int64_t bytes) {
    return bytes < kLargeBytes ? kRepeats : kLargeRepeats;
  }
  void finish() const {
    if (runtime_ != nullptr) {
      runtime_->synchronize();
    }
  }

  // Of each repeat the slowest process counts: training waits for it.
  double median_of_slowest(int64_t repeats,
                           const std::function<void()>& prepare,
                           const std::function<void()>& work) {
    std::vector<double> times;
    for (int64_t i = 0; i < kWarmUp + repeats; ++i) {
      prepare();
      finish();
      all_.barrier("the beginning of a timing");
      const double ms = milliseconds_of([&] { work(), finish(); });
      const auto ns = all_.values_of_all(std::llround(1e6 * ms), "the times of all");
      if (i >= kWarmUp) {
        times.push_back(static_cast<double>(std::ranges::max(ns)) / 1e6);
      }
    }
    return spread_of(std::move(times)).median;
  }

  std::vector<int64_t> ranks_that(bool say_so) {
    const auto said = all_.values_of_all(say_so ? 1 : 0, "what was wrong");
    std::vector<int64_t> ranks;
    for (size_t rank = 0; rank < said.size(); ++rank) {
      if (said[rank] != 0) {
        ranks.push_back(static_cast<int64_t>(rank));
      }
    }
    return ranks;
  }

  // Whether somebody asks to stop: 63 bits.
  OperationTime time_agreement() {
    constexpr int64_t kBits = 63;
    int64_t expected = 0;
    for (int64_t rank = 0; rank < all_.world_size(); ++rank) {
      expected |= int64_t{1} << (rank % kBits);
    }
    bool is_wrong = false;
    OperationTime time{.operation = LinkOperation::kAgreement, .bytes = kBits};
    time.ms = median_of_slowest(
        kRepeats,
        [] {},
        [&] {
          const int64_t own = int64_t{1} << (all_.rank() % kBits);
          is_wrong |= all_.any_bits(own, "the timing of an agreement") != expected;
        });
    time.wrong_ranks = ranks_that(is_wrong);
    return time;
  }

  Communicator& all_;
  ops::DeviceRuntime* runtime_;
  int64_t max_bytes_;
};

// As the machine calls itself.
std::vector<std::string> machines_of_all(Communicator& communicator) {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  communicator.leave_note(fmt::format("machine of {}", communicator.rank()), name.data());
  std::vector<std::string> machines;
  for (int64_t rank = 0; rank < communicator.world_size(); ++rank) {
    machines.push_back(
        communicator.read_note(fmt::format("machine of {}", rank), "the name of a machine"));
  }
  return machines;
}

}  // namespace

LinkReport time_links(Communicator& communicator, const LinkSettings& settings) {
  LinkTimer timer(communicator, settings);
  LinkReport report{
      .backend = settings.runtime == nullptr ? "Gloo, between CPUs" : "NCCL, between GPUs",
      .machines = machines_of_all(communicator),
      .operations = {},
      .link_bytes = timer.link_bytes(),
      .links = {}};
  for (const LinkOperation operation : {LinkOperation::kSum,
                                        LinkOperation::kReduceScatter,
                                        LinkOperation::kAllGather,
                                        LinkOperation::kBroadcast}) {
    for (const int64_t bytes : kSizes) {
      if (bytes <= settings.max_bytes) {
        communicator.set_activity(fmt::format("{} of {} bytes", name_of(operation), bytes));
        report.operations.push_back(timer.time(operation, bytes));
      }
    }
  }
  report.operations.push_back(timer.time(LinkOperation::kAgreement, 0));
  for (int64_t from = 0; from < communicator.world_size(); ++from) {
    for (int64_t to = 0; to < communicator.world_size(); ++to) {
      if (from != to) {
        communicator.set_activity(fmt::format("link from rank {} to rank {}", from, to));
        report.links.push_back(timer.time_link(from, to));
      }
    }
  }
  // What one waited for may be over by now.
  for (int64_t i = 0; i < kSecondLooks; ++i) {
    const auto slow = slow_link(report.links);
    if (!slow) {
      break;
    }
    const LinkTime again = timer.time_link(slow->from, slow->to);
    LinkTime& link = *std::ranges::find(report.links, *slow);
    link.gb_per_s = std::max(link.gb_per_s, again.gb_per_s);
    link.latency_us = std::min(link.latency_us, again.latency_us);
    link.is_wrong |= again.is_wrong;
  }
  return report;
}

}  // namespace rwkv
