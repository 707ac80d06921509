#include "train/distributed/rank_process.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace rwkv {
namespace {

constexpr int kCannotExecute = 127;

std::string prefix_of(int64_t rank) {
  return "[" + std::to_string(rank) + "] ";
}

// All of `text`, though it may be a pipe that takes only a part at a time.
bool write_all(int file, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(file, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd ready{.fd = file, .events = POLLOUT, .revents = 0};
      poll(&ready, 1, -1);
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
  std::vector<char*> result;
  for (const std::string& text : texts) {
    // execve promises not to write there.
    result.push_back(const_cast<char*>(text.c_str()));
  }
  result.push_back(nullptr);
  return result;
}

struct ChildSetup {
  const char* program;
  char* const* arguments;
  char* const* environment;
  int output;
  int error;
  pid_t parent;
  const sigset_t* mask;
};

// The child's way to its program. Nothing here allocates.
[[noreturn]] void become(const ChildSetup& setup) {
  setpgid(0, 0);
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // The launcher may have died before Linux was asked.
  if (getppid() != setup.parent) {
    _exit(kCannotExecute);
  }
  // A signal that comes before the program has its own handlers ends the child: ours, which only
  // note it, would lose it.
  for (const int signal : {SIGTERM, SIGINT, SIGCHLD, SIGPIPE}) {
    std::signal(signal, SIG_DFL);
  }
  sigprocmask(SIG_SETMASK, setup.mask, nullptr);
  const int nothing = open("/dev/null", O_RDONLY);
  dup2(nothing, STDIN_FILENO);
  if (nothing != STDIN_FILENO) {
    close(nothing);
  }
  dup2(setup.output, STDOUT_FILENO);
  dup2(setup.error, STDERR_FILENO);
  execve(setup.program, setup.arguments, setup.environment);
  const char* const reason = std::strerror(errno);
  for (const char* part : {setup.program, ": cannot be executed: ", reason, "\n"}) {
    write_all(STDERR_FILENO, part);
  }
  _exit(kCannotExecute);
}

}  // namespace

LinePipe::LinePipe(std::string prefix, int to) : prefix_(std::move(prefix)), to_(to) {
  std::array<int, 2> ends{};
  if (pipe2(ends.data(), O_CLOEXEC) != 0) {
    throw std::runtime_error(std::string("no pipe can be made for the output of a rank: ") +
                             std::strerror(errno) + "; start fewer ranks, or raise ulimit -n");
  }
  read_end_ = ends[0];
  write_end_ = ends[1];
  fcntl(read_end_, F_SETFL, O_NONBLOCK);
}

LinePipe::~LinePipe() {
  close_child_end();
  if (read_end_ >= 0) {
    close(read_end_);
  }
}

void LinePipe::close_child_end() {
  if (write_end_ >= 0) {
    close(write_end_);
    write_end_ = -1;
  }
}

void LinePipe::hand_on(const std::string& line) {
  if (!line.empty()) {
    last_line_ = line;
  }
  // One write, so that lines of others do not come between.
  all_written_ = write_all(to_, prefix_ + line + "\n") && all_written_;
}

void LinePipe::pump() {
  // As much as a pipe holds, and only once: a child that writes without end must not keep the
  // launcher from the others.
  std::array<char, size_t{64} << 10> part;
  ssize_t size = -1;
  do {
    size = read_end_ < 0 ? -1 : read(read_end_, part.data(), part.size());
  } while (size < 0 && read_end_ >= 0 && errno == EINTR);
  if (read_end_ < 0 || (size < 0 && errno == EAGAIN)) {
    return;
  }
  if (size <= 0) {
    close(read_end_);
    read_end_ = -1;
    return;
  }
  for (const char c : std::string_view(part.data(), static_cast<size_t>(size))) {
    if (c == '\n' || begun_.size() == kMostLineBytes) {
      hand_on(begun_);
      begun_.clear();
    }
    if (c != '\n') {
      begun_ += c;
    }
  }
}

void LinePipe::finish() {
  pump();
  if (read_end_ >= 0) {
    close(read_end_);
    read_end_ = -1;
  }
  if (!begun_.empty()) {
    hand_on(begun_);
    begun_.clear();
  }
}

std::string describe(const ProcessEnd& end) {
  if (end.signal == 0) {
    return "ended with exit code " + std::to_string(end.exit_code);
  }
  const char* const name = sigabbrev_np(end.signal);
  return "was killed by " +
         (name != nullptr ? "SIG" + std::string(name) : "signal " + std::to_string(end.signal));
}

RankProcess::RankProcess(int64_t rank, const RankCommand& command, const sigset_t& mask)
    : rank_(rank),
      stdout_(rank == 0 ? "" : prefix_of(rank), STDOUT_FILENO),
      stderr_(prefix_of(rank), STDERR_FILENO) {
  const std::vector<char*> arguments = pointers(command.arguments);
  const std::vector<char*> environment = pointers(command.environment);
  const ChildSetup setup{.program = command.program.c_str(),
                         .arguments = arguments.data(),
                         .environment = environment.data(),
                         .output = stdout_.child_end(),
                         .error = stderr_.child_end(),
                         .parent = getpid(),
                         .mask = &mask};
  id_ = fork();
  if (id_ == 0) {
    become(setup);
  }
  if (id_ < 0) {
    throw std::runtime_error("rank " + std::to_string(rank) +
                             " cannot be started: " + std::strerror(errno) +
                             "; is memory short, or the number of processes limited (ulimit -u)?");
  }
  // Also here: whoever of the two comes first, the group is there for send().
  setpgid(id_, id_);
  stdout_.close_child_end();
  stderr_.close_child_end();
}

RankProcess::~RankProcess() {
  if (id_ > 0 && running()) {
    send(SIGKILL);
    waitpid(id_, nullptr, 0);
  }
}

void RankProcess::send(int signal) {
  if (running()) {
    kill(-id_, signal);
  }
}

bool RankProcess::reap() {
  if (!running()) {
    return false;
  }
  siginfo_t info{};
  // Only looks: as long as it is not waited for, nobody else can get the number of its group.
  if (waitid(P_PID, static_cast<id_t>(id_), &info, WEXITED | WNOHANG | WNOWAIT) != 0 ||
      info.si_pid != id_) {
    return false;
  }
  kill(-id_, SIGKILL);
  int status = 0;
  waitpid(id_, &status, 0);
  end_ = WIFSIGNALED(status) ? ProcessEnd{.exit_code = 0, .signal = WTERMSIG(status)}
                             : ProcessEnd{.exit_code = WEXITSTATUS(status), .signal = 0};
  stdout_.finish();
  stderr_.finish();
  return true;
}

}  // namespace rwkv
