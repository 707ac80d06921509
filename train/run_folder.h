// The folder of a run, RUN: what lies where, which of its checkpoints stay, and that one program at
// a time trains in it. No Torch.
//
//   RUN/config.toml            the resolved configuration
//   RUN/parameters.txt         every tensor of the model: shape, whether it is trained, how fast
//   RUN/metrics.jsonl          a line for each logged step (train/metrics.h)
//   RUN/samples.jsonl          texts written during the run, if asked for
//   RUN/skipped.jsonl          a line for each step that was skipped, if outliers are
//   RUN/starts.jsonl           a line for each start of the run
//   RUN/tensorboard/           event files (train/event_file.h)
//   RUN/checkpoints/step_...   a folder each (train/checkpoint.h)
//   RUN/lock                   held while a program trains here
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "model/formats/weight_file.h"
#include "train/manifest.h"
#include "train/run_config.h"

namespace rwkv {

// Key of the resolved configuration in the metadata of our model files.
inline constexpr const char* kRunConfigKey = "rookery.config";
// And of the identity (data/tokenizer.h) of the tokenizer that the model was trained with.
inline constexpr const char* kTokenizerKey = "rookery.tokenizer";

std::filesystem::path checkpoints_folder(const std::string& run_dir);
// "step_00000200".
std::string checkpoint_name(int64_t step);
// The name under which a checkpoint is written, or deleted: not taken for a whole one.
std::string partial_name(const std::string& checkpoint_name);

// Path of the checkpoint with the largest step in a run, if there is one; with `before_step`, of
// those with a smaller step than that.
std::optional<std::string> newest_checkpoint(const std::string& run_dir,
                                             std::optional<int64_t> before_step = {});

// The checkpoint that a run goes on from.
struct WholeCheckpoint {
  std::optional<std::string> path;   // nothing: the run has none, and begins
  std::vector<std::string> refused;  // of those that are newer: what is wrong with each
};
// The newest one that is whole (train/manifest.h), with a smaller step than `before_step` if that
// is given. Throws std::runtime_error if there are checkpoints and none is whole: a run never
// begins anew because of a damaged file.
WholeCheckpoint newest_whole_checkpoint(const std::string& run_dir,
                                        Scrutiny scrutiny,
                                        std::optional<int64_t> before_step = {});

// Which checkpoints stay: the newest ones, and those whose step is a multiple of every_steps.
struct Retention {
  int64_t newest = 1;  // 1 or more, so that the last one always stays
  std::optional<int64_t> every_steps = {};
};
// Deletes the others up to `saved_step`, the step just saved, and whatever an interrupted save or
// deletion left. A checkpoint that lacks a file, or has one of another size than its manifest says,
// is not counted, so that the last whole one stays. Folders of later steps are not this run's: they
// stay, and count for nothing.
void delete_old_checkpoints(const std::string& run_dir,
                            int64_t saved_step,
                            const Retention& retention);

// Makes the folder of checkpoints if it is not there. Throws std::runtime_error if none could be
// saved there: better now than after the first hours.
void require_writable_checkpoints(const std::string& run_dir);
// Throws std::runtime_error if the disk has less than 1.05 times these bytes free.
void require_space_for_checkpoint(const std::string& run_dir, uint64_t bytes);
// Both, for a run that has failed: if its next save, as large as its newest checkpoint, could not
// be made as things are, there is no sense in starting it again. What is left of a save that was
// interrupted counts as free. Does nothing if there is no checkpoint.
void require_space_for_next_checkpoint(const std::string& run_dir);

// The weights that a path given by a user means: a run's newest checkpoint, or the path itself (a
// checkpoint folder or a weight file). Those who read all weights ask for Scrutiny::kWeights.
// Throws std::runtime_error if a run holds no checkpoint, or naming the file if the newest is not
// whole, and the newest older one that is.
std::string find_model(const std::string& path, Scrutiny scrutiny = Scrutiny::kSizes);
// The same error if a checkpoint, which may have been named itself, has damaged weights.
void require_whole_model(const std::string& path);

// The configuration kept in a model file's metadata, if it was made by us.
std::optional<RunConfig> config_in(const WeightFile& file);
// The identity of the tokenizer a model was trained with, if its file says so.
std::optional<std::string> tokenizer_identity_in(const WeightFile& file);
// Reads a configuration kept in a file of ours: what is wrong with it is the file's fault
// (std::runtime_error), not the user's.
RunConfig parse_kept_config(const std::string& text, const std::string& name);

// Makes the folder if needed and holds RUN/lock until destroyed; the operating system lets go of it
// when the program ends, however it ends. Throws std::runtime_error naming the program that holds
// it, or the folder that cannot be made or written.
class RunLock {
 public:
  explicit RunLock(const std::string& run_dir);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int file_ = -1;
};

}  // namespace rwkv
