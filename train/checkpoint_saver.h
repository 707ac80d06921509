// Saves checkpoints while training goes on: the step waits for a copy of its numbers, a thread
// writes them.
//
// The copy stays from save to save: 4 bytes of host memory for each parameter and 8 more for each
// that is trained, from the first save on.
#pragma once

#include <future>
#include <optional>
#include <string>

#include "train/checkpoint.h"

namespace rwkv {

class CheckpointSaver {
 public:
  explicit CheckpointSaver(CheckpointSettings settings);
  // Waits for the save under way, and logs what nobody has asked for: its path, or its failure.
  ~CheckpointSaver();
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  // Copies masters and moments, and begins to write them as save_checkpoint() does. No save may be
  // under way: call wait() before.
  void start(const Optimizer& optimizer, const TrainerState& state);
  // The checkpoint that has become whole and durable, once: nothing while it is being written, or
  // if there is none. Throws what the save failed with.
  std::optional<std::string> take_saved();
  // The same, after waiting for it.
  std::optional<std::string> wait();
  // Waits until no save is under way; its outcome stays for the calls above.
  void settle() const;

 private:
  const CheckpointSettings settings_;
  CheckpointPieces pieces_;          // the thread's while it writes
  std::future<std::string> saving_;  // valid from start() until its outcome is taken
};

}  // namespace rwkv
