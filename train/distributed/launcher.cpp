#include "train/distributed/launcher.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string_view>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <spdlog/spdlog.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "train/distributed/rank_process.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kUsage = 2;
constexpr int kSignalled = 128;
constexpr int64_t kMostFruitlessRestarts = 2;

bool is_stop_signal(int signal) {
  return signal == SIGTERM || signal == SIGINT || signal == SIGHUP;
}

std::string signal_name(int signal) {
  return "SIG" + std::string(sigabbrev_np(signal));
}

int exit_code_of(const ProcessEnd& end) {
  return end.signal != 0 ? kSignalled + end.signal : end.exit_code;
}

// While it lives, the signals that concern the launcher wait to be read from a file.
class Signals {
 public:
  Signals() {
    // A child would never be waited for if this is ignored, and a reader of our output that leaves
    // must not end the run.
    old_child_ = std::signal(SIGCHLD, SIG_DFL);
    old_pipe_ = std::signal(SIGPIPE, SIG_IGN);
    sigset_t ours;
    sigemptyset(&ours);
    for (const int signal : {SIGCHLD, SIGTERM, SIGINT}) {
      sigaddset(&ours, signal);
    }
    struct sigaction hangup = {};
    if (sigaction(SIGHUP, nullptr, &hangup) == 0 && hangup.sa_handler != SIG_IGN) {
      sigaddset(&ours, SIGHUP);
    }
    sigprocmask(SIG_BLOCK, &ours, &old_mask_);
    file_ = signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
  }
  ~Signals() {
    close(file_);
    sigprocmask(SIG_SETMASK, &old_mask_, nullptr);
    std::signal(SIGPIPE, old_pipe_);
    std::signal(SIGCHLD, old_child_);
  }
  Signals(const Signals&) = delete;
  Signals& operator=(const Signals&) = delete;

  int file() const { return file_; }
  const sigset_t& old_mask() const { return old_mask_; }
  // Those that have come: stop signals only, for SIGCHLD has done its work when the poll returns.
  std::vector<int> take() {
    std::vector<int> taken;
    signalfd_siginfo info{};
    while (read(file_, &info, sizeof(info)) == sizeof(info)) {
      if (is_stop_signal(static_cast<int>(info.ssi_signo))) {
        taken.push_back(static_cast<int>(info.ssi_signo));
      }
    }
    return taken;
  }

 private:
  int file_ = -1;
  sigset_t old_mask_{};
  void (*old_child_)(int) = SIG_DFL;
  void (*old_pipe_)(int) = SIG_DFL;
};

// A port of 127.0.0.1 that nobody listens at, now.
int64_t free_port() {
  const int socket_file = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  const bool found = socket_file >= 0 && bind(socket_file, generic, size) == 0 &&
                     getsockname(socket_file, generic, &size) == 0;
  const int reason = errno;
  close(socket_file);
  if (!found) {
    throw std::runtime_error(std::string("no free port on 127.0.0.1: ") + std::strerror(reason) +
                             "; is the loopback device up?");
  }
  return ntohs(address.sin_port);
}

// Those of this process, without what `variables` replaces and what an outer launcher left.
std::vector<std::string> environment_with(const std::vector<std::string>& variables) {
  const auto replaced = [&](std::string_view entry) {
    const std::string_view name = entry.substr(0, entry.find('='));
    return name == "TORCHELASTIC_USE_AGENT_STORE" ||
           std::any_of(variables.begin(), variables.end(), [&](const std::string& variable) {
             return variable.starts_with(std::string(name) + "=");
           });
  };
  std::vector<std::string> result;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    if (!replaced(*entry)) {
      result.emplace_back(*entry);
    }
  }
  result.insert(result.end(), variables.begin(), variables.end());
  return result;
}

// Path of the newest checkpoint, or nothing if there is none or the folder cannot be read.
std::optional<std::string> checkpoint_in(const std::string& run_dir) {
  try {
    return run_dir.empty() ? std::nullopt : newest_checkpoint(run_dir);
  } catch (const std::filesystem::filesystem_error&) {
    return std::nullopt;
  }
}

// Why the run's next save would fail as this one's did, or nothing if it need not.
std::optional<std::string> hindrance_to_saving(const std::string& run_dir) {
  try {
    if (!run_dir.empty()) {
      require_space_for_next_checkpoint(run_dir);
    }
  } catch (const std::filesystem::filesystem_error&) {
    // Launchers of other machines look at the same moment, and clean up: the ranks will find out.
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return std::nullopt;
}

// Steps have leading zeros up to eight digits, and more digits beyond.
bool is_newer(const std::optional<std::string>& now, const std::optional<std::string>& before) {
  if (!now || !before) {
    return now.has_value();
  }
  return now->size() != before->size() ? now->size() > before->size() : *now > *before;
}

// One start of all ranks, up to the end of the last.
class Start {
 public:
  Start(const LaunchPlan& plan, int64_t restart, Signals& signals)
      : plan_(plan), signals_(signals) {
    const int64_t port = plan.master_port ? *plan.master_port : free_port();
    for (int64_t local = 0; local < plan.ranks_here; ++local) {
      const int64_t rank = plan.node_rank * plan.ranks_here + local;
      const RankCommand command{
          .program = plan.program,
          .arguments = plan.arguments,
          .environment =
              environment_with({"RANK=" + std::to_string(rank),
                                "WORLD_SIZE=" + std::to_string(plan.num_nodes * plan.ranks_here),
                                "LOCAL_RANK=" + std::to_string(local),
                                "LOCAL_WORLD_SIZE=" + std::to_string(plan.ranks_here),
                                "MASTER_ADDR=" + plan.master_host,
                                "MASTER_PORT=" + std::to_string(port),
                                "ROOKERY_LAUNCHER=1",
                                "ROOKERY_RESTART=" + std::to_string(restart)})};
      ranks_.push_back(std::make_unique<RankProcess>(rank, command, signals.old_mask()));
    }
  }

  void run() {
    while (any_runs()) {
      wait();
      for (const auto& rank : ranks_) {
        rank->standard_output().pump();
        rank->standard_error().pump();
      }
      for (const int signal : signals_.take()) {
        take_signal(signal);
      }
      reap();
      if (deadline_ && Clock::now() >= *deadline_) {
        spdlog::warn("{} have not ended in the time they had; they are killed", running_ranks());
        kill_all();
      }
    }
  }

  bool asked_to_stop() const { return stop_signal_ != 0; }
  const std::optional<ProcessEnd>& failure() const { return failure_; }
  int exit_code() const {
    if (failure_) {
      return exit_code_of(*failure_);
    }
    if (was_killed_) {
      return kSignalled + SIGKILL;
    }
    return stopped_one_ ? kSignalled + stop_signal_ : 0;
  }
  bool output_is_whole() const {
    return std::all_of(ranks_.begin(), ranks_.end(), [](const auto& rank) {
      return rank->standard_output().all_written();
    });
  }

 private:
  bool any_runs() const {
    return std::any_of(
        ranks_.begin(), ranks_.end(), [](const auto& rank) { return rank->running(); });
  }
  std::string running_ranks() const {
    std::string text;
    for (const auto& rank : ranks_) {
      if (rank->running()) {
        text += (text.empty() ? "ranks " : ", ") + std::to_string(rank->rank());
      }
    }
    return text;
  }

  // For output, a signal, the end of a rank, or the deadline.
  void wait() {
    std::vector<pollfd> files{{.fd = signals_.file(), .events = POLLIN, .revents = 0}};
    for (const auto& rank : ranks_) {
      // A file below 0 is passed over.
      files.push_back({.fd = rank->standard_output().read_end(), .events = POLLIN, .revents = 0});
      files.push_back({.fd = rank->standard_error().read_end(), .events = POLLIN, .revents = 0});
    }
    int timeout_ms = -1;
    if (deadline_) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline_ - Clock::now());
      timeout_ms = static_cast<int>(std::max<int64_t>(0, left.count()));
    }
    poll(files.data(), files.size(), timeout_ms);
  }

  void send_all(int signal) {
    for (const auto& rank : ranks_) {
      rank->send(signal);
    }
  }
  void kill_all() {
    was_killed_ = true;
    deadline_.reset();
    send_all(SIGKILL);
  }

  void begin_stop(int signal) {
    stop_signal_ = signal;
    if (!failure_) {
      deadline_ = Clock::now() + plan_.stop_grace;
      send_all(signal);
    }
  }

  void take_signal(int signal) {
    if (stop_signal_ == 0) {
      spdlog::info("{}: all ranks are asked to stop", signal_name(signal));
      begin_stop(signal);
    } else if (signal != SIGHUP) {
      // Not for SIGHUP: a terminal that closes may send it twice.
      spdlog::warn("{} again: all ranks are killed", signal_name(signal));
      kill_all();
    }
  }

  void reap() {
    std::vector<RankProcess*> ended;
    for (const auto& rank : ranks_) {
      if (rank->reap()) {
        ended.push_back(rank.get());
      }
    }
    // Of several that end at once the first to be named is the one that others can have failed
    // from: a wrong configuration, then what was killed.
    const auto blame = [](const RankProcess* rank) {
      const ProcessEnd& end = rank->end();
      return end.signal != 0 ? 1 : end.exit_code == kUsage ? 0 : 2;
    };
    std::stable_sort(ended.begin(), ended.end(), [&](const auto* a, const auto* b) {
      return blame(a) < blame(b);
    });
    for (RankProcess* rank : ended) {
      judge(*rank);
    }
  }

  void judge(RankProcess& rank) {
    const ProcessEnd& end = rank.end();
    if (end == ProcessEnd{}) {
      return;
    }
    const int asked = end.exit_code - kSignalled;
    const bool stopped = is_stop_signal(asked) && end.signal == 0;
    if (stopped && stop_signal_ == 0 && !failure_) {
      spdlog::info(
          "rank {} was asked to stop by {}; so are the others", rank.rank(), signal_name(asked));
      begin_stop(asked);
    }
    // The signal itself ends a rank that has not come so far as to save.
    if (stop_signal_ != 0 && (stopped || end.signal == stop_signal_)) {
      stopped_one_ = true;
      return;
    }
    if (failure_ || was_killed_) {
      return;
    }
    failure_ = end;
    const std::string& last = rank.standard_error().last_line();
    spdlog::error(
        "rank {} (process {}) {}{}{}",
        rank.rank(),
        rank.id(),
        describe(end),
        end.signal == SIGKILL ? ", by somebody or by Linux where memory ran out" : "",
        last.empty() ? "; it wrote nothing to stderr" : "; its last line on stderr: " + last);
    if (stop_signal_ == 0) {
      deadline_ = Clock::now() + plan_.fault_grace;
      send_all(SIGTERM);
    }
  }

  const LaunchPlan& plan_;
  Signals& signals_;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
  int stop_signal_ = 0;                // the first that came
  bool stopped_one_ = false;           // a rank ended for it
  bool was_killed_ = false;            // all got SIGKILL
  std::optional<ProcessEnd> failure_;  // the first
  std::optional<Clock::time_point> deadline_;
};

}  // namespace

LaunchResult launch(const LaunchPlan& plan) {
  Signals signals;
  int64_t fruitless = 0;
  for (int64_t restart = 0;; ++restart) {
    const auto before = checkpoint_in(plan.run_dir);
    Start start(plan, restart, signals);
    start.run();
    if (!start.output_is_whole()) {
      throw std::runtime_error(
          "what the ranks printed cannot be written to standard output; is the disk full?");
    }
    const LaunchResult result{.exit_code = start.exit_code(), .restarts = restart};
    if (!start.failure() || start.asked_to_stop()) {
      return result;
    }
    if (start.failure()->exit_code == kUsage) {
      spdlog::error("not started again: what is wrong with the configuration stays wrong");
      return result;
    }
    if (const auto hindrance = hindrance_to_saving(plan.run_dir)) {
      spdlog::error("not started again, for nothing could be saved: {}", *hindrance);
      return result;
    }
    const auto now = checkpoint_in(plan.run_dir);
    // The first start is no restart.
    fruitless = restart == 0 || is_newer(now, before) ? 0 : fruitless + 1;
    if (restart == plan.max_restarts) {
      spdlog::error("given up after {} restarts{}",
                    restart,
                    restart == 0 ? "" : "; --max-restarts allows more");
      return result;
    }
    if (fruitless == kMostFruitlessRestarts) {
      spdlog::error("given up: {} restarts in a row left no newer checkpoint{}",
                    fruitless,
                    before ? " than " + *before : "");
      return result;
    }
    spdlog::warn("restart {} of {} from the newest checkpoint{}",
                 restart + 1,
                 plan.max_restarts,
                 now                    ? ", " + *now
                 : plan.run_dir.empty() ? ""
                                        : ": there is none yet, so from the beginning");
  }
}

}  // namespace rwkv
