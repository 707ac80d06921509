// The step line of a run that is watched: redrawn in place after every step on a terminal, and not
// at all where the log goes to a file.
#pragma once

#include <cstddef>
#include <string>

namespace rwkv {

class TerminalLine {
 public:
  // Draws on `file` (a file descriptor, 2 for stderr) if it is a terminal.
  explicit TerminalLine(int file);
  ~TerminalLine() { clear(); }
  TerminalLine(const TerminalLine&) = delete;
  TerminalLine& operator=(const TerminalLine&) = delete;

  // Columns that a line may have: one less than the terminal, which may go to the next line in its
  // last one.
  size_t width() const;
  // Replaces the line by `text`, cut to that width.
  void draw(const std::string& text);
  // Takes the line away: call before anything else is written to the terminal.
  void clear();

 private:
  void write(const std::string& text) const;

  int file_;
  bool is_terminal_;
  bool drawn_ = false;
};

}  // namespace rwkv
