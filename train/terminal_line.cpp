#include "train/terminal_line.h"

#include <sys/ioctl.h>
#include <unistd.h>

namespace rwkv {
namespace {

constexpr const char* kEraseLine = "\r\x1b[2K";

}  // namespace

TerminalLine::TerminalLine(int file) : file_(file), is_terminal_(isatty(file) == 1) {}

size_t TerminalLine::width() const {
  winsize size = {};
  return (ioctl(file_, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80) - 1;
}

void TerminalLine::draw(const std::string& text) {
  if (!is_terminal_) {
    return;
  }
  write(kEraseLine + text.substr(0, width()));
  drawn_ = true;
}

void TerminalLine::clear() {
  if (drawn_) {
    write(kEraseLine);
    drawn_ = false;
  }
}

void TerminalLine::write(const std::string& text) const {
  // A terminal that is gone is no reason to stop training.
  if (::write(file_, text.data(), text.size()) < 0) {
    return;
  }
}

}  // namespace rwkv
