// One rank as a child of the launcher: how it is started, what it prints, how it is ended. No
// Torch.
#pragma once

#include <csignal>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include <sys/types.h>

namespace rwkv {

// The lines that a child writes to one of its outputs, each handed on with a prefix as soon as it
// is whole. A line of more than kMostLineBytes is handed on as several. Not to be copied.
class LinePipe {
 public:
  static constexpr size_t kMostLineBytes = size_t{64} << 10;

  // Lines go to the file descriptor `to`, each after `prefix`. Throws std::runtime_error if there
  // are no descriptors left.
  LinePipe(std::string prefix, int to);
  ~LinePipe();
  LinePipe(const LinePipe&) = delete;
  LinePipe& operator=(const LinePipe&) = delete;

  // Which end the child writes to, and that this process no longer does.
  int child_end() const { return write_end_; }
  void close_child_end();
  // The end to poll; below 0 once the child has closed its own.
  int read_end() const { return read_end_; }
  // Hands on what there is to read, without waiting for more.
  void pump();
  // pump(), then what is left of a line that no newline ended, and no more after that: of a child
  // that is gone, though a process it started may still hold the pipe.
  void finish();
  // The last line that was not empty.
  const std::string& last_line() const { return last_line_; }
  // False once something could not be written (a full disk, a reader that left).
  bool all_written() const { return all_written_; }

 private:
  void hand_on(const std::string& line);

  std::string prefix_;
  int to_;
  int read_end_ = -1;
  int write_end_ = -1;
  std::string begun_;  // of the line that has not ended
  std::string last_line_;
  bool all_written_ = true;
};

// What is executed as a rank.
struct RankCommand {
  std::string program;                   // a path
  std::vector<std::string> arguments;    // argv, [0] among it
  std::vector<std::string> environment;  // "NAME=value" each; nothing else of ours is handed on
};

// How a process ended.
struct ProcessEnd {
  int exit_code = 0;
  int signal = 0;  // that killed it; 0 if it ended by itself
  bool operator==(const ProcessEnd&) const = default;
};

// "ended with exit code 3", "was killed by SIGSEGV".
std::string describe(const ProcessEnd& end);

// A running child in a process group of its own. If this process dies, however it dies, Linux kills
// the child, too. It reads nothing from stdin. What it prints on stdout is handed on, of rank 0 as
// it is, of others after "[rank] "; lines of stderr always get that prefix. The object kills what
// still runs when it goes.
class RankProcess {
 public:
  // The child gets the signal mask `mask`. Call from the thread that lives as long as the child
  // should. Throws std::runtime_error if no process can be made. A program that cannot be executed
  // is a child that says so and ends with 127.
  RankProcess(int64_t rank, const RankCommand& command, const sigset_t& mask);
  ~RankProcess();
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  int64_t rank() const { return rank_; }
  pid_t id() const { return id_; }
  LinePipe& standard_output() { return stdout_; }
  LinePipe& standard_error() { return stderr_; }
  bool running() const { return !end_; }
  // How it ended; only of one that no longer runs.
  const ProcessEnd& end() const { return *end_; }
  // To the process and those it started, if it runs.
  void send(int signal);
  // Looks whether it has ended. If so, kills what it started and left, hands on its last lines, and
  // returns true, once.
  bool reap();

 private:
  int64_t rank_;
  LinePipe stdout_;
  LinePipe stderr_;
  pid_t id_ = -1;
  std::optional<ProcessEnd> end_;
};

}  // namespace rwkv
