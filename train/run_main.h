// What every command shares: the log, and exceptions turned into exit codes.
#pragma once

#include <functional>
#include <stdexcept>

namespace rwkv {

// Our mistake, not the user's and not the machine's.
struct BugError : std::logic_error {
  using std::logic_error::logic_error;
};
// The text says what was asked for; the advice is added where it is reported.
struct OutOfMemory : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// 0 done, 1 the run failed (a file, the machine), 2 usage or configuration, 70 a bug of ours, 128 +
// the signal that a run was stopped by, after saving.
inline constexpr int kExitFailed = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitBug = 70;
inline constexpr int kExitSignal = 128;

// Sends the log to stderr, then runs `command` and returns its exit code; an exception becomes one
// line on stderr and the code of its kind.
int run_main(const std::function<int()>& command);

}  // namespace rwkv
