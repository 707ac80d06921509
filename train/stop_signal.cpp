#include "train/stop_signal.h"

#include <csignal>

namespace rwkv {
namespace {

// A handler may touch nothing else.
volatile std::sig_atomic_t noted_signal = 0;

void note(int signal) {
  if (signal == SIGINT && noted_signal == SIGINT) {
    std::signal(SIGINT, SIG_DFL);
    std::raise(SIGINT);
    return;
  }
  noted_signal = signal;
}

}  // namespace

void catch_stop_signals() {
  struct sigaction action = {};
  action.sa_handler = &note;
  sigemptyset(&action.sa_mask);
  // Without it a read or write that the signal meets half way would fail.
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGINT, &action, nullptr);
  // Under nohup it is ignored, and stays so.
  struct sigaction inherited = {};
  if (sigaction(SIGHUP, nullptr, &inherited) == 0 && inherited.sa_handler != SIG_IGN) {
    sigaction(SIGHUP, &action, nullptr);
  }
}

int stop_signal() {
  return noted_signal;
}

}  // namespace rwkv
