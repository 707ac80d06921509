// Saves checkpoints while training goes on: a thread copies the step's numbers, then writes them.
// On a CPU the next forward and backward pass run while it copies, for they change none of what is
// saved, and only the update after them waits for the copy; a GPU's numbers are copied first.
//
// Of several processes each copies and writes what it owns, all at once. The first makes the folder
// and completes the checkpoint when it has heard of every file; they tell each other by notes
// (train/distributed/communicator.h), for the threads that train are busy with other operations. If
// one of them fails, all do, and nothing of the checkpoint is left.
//
// The copy stays from save to save: 4 bytes of host memory for each parameter and 8 more for each
// that is trained, shared by the processes, from the first save on.
#pragma once

#include <future>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "train/checkpoint.h"
#include "train/distributed/communicator.h"

namespace rwkv {

struct SavedCheckpoint {
  std::string path;
  double save_s = 0;  // from start() until it was whole and durable
  double wait_s = 0;  // what the thread that trains spent in this save's calls below
};

// "saved PATH in 1.24 s (training waited 0.01 s)".
std::string describe(const SavedCheckpoint& saved);

class CheckpointSaver {
 public:
  // `communicator` is null for one process alone; else it outlives the saver.
  explicit CheckpointSaver(CheckpointSettings settings, Communicator* communicator = nullptr);
  // Waits for the save under way, and logs what nobody has asked for: it, or its failure.
  ~CheckpointSaver();
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  // Begins to save as save_checkpoint() does. No save may be under way: call wait() before. The
  // optimizer must not be changed before wait_for_copy() has returned.
  void start(const Optimizer& optimizer, const TrainerState& state);
  void wait_for_copy();
  // The checkpoint that has become whole and durable, once: nothing while it is being written, or
  // if there is none. Throws what the save failed with.
  std::optional<SavedCheckpoint> take_saved();
  // The same, after waiting for it.
  std::optional<SavedCheckpoint> wait();
  // Waits until no save is under way, and throws what it failed with; a checkpoint stays for the
  // calls above.
  void settle();

 private:
  std::string save_together(const TrainerState& state);
  std::vector<ManifestFile> write_own(int64_t step);
  std::string complete(const TrainerState& state, const std::string& save);
  std::vector<ManifestFile> files_of_all(const std::string& save);

  const CheckpointSettings settings_;
  Communicator* const communicator_;
  CheckpointPieces pieces_;                     // the thread's while it saves
  std::shared_future<void> copied_;             // ready once the thread has its copy, or has failed
  std::shared_future<SavedCheckpoint> saving_;  // valid from start() until its outcome is taken
  double wait_s_ = 0;                           // of the save of `saving_`, so far
  // Of the save before this one, which everybody has read once all have written this one.
  std::vector<std::string> old_notes_;
};

}  // namespace rwkv
