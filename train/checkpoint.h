// Checkpoints of a run: a folder each, complete or absent.
//
//   RUN/checkpoints/step_00000200/
//     model.safetensors      master weights, fp32, RWKV-LM's names; metadata "rookery.config" holds
//                            the resolved configuration, "rookery.tokenizer" the identity of the
//                            tokenizer that made the corpus, if it is known
//     optimizer.safetensors  AdamW's moments as m.<name> and v.<name>, fp32
//     trainer.json           step, tokens and samples seen: data position and schedule follow; the
//                            seconds that it took; the fingerprints of the corpus and of
//                            init.state; how many processes wrote the checkpoint; what
//                            outliers are compared with (train/outlier_guard.h), if they are
//                            skipped
//     config.toml            the resolved configuration
//     manifest.json          every other file with its size and checksum (train/manifest.h)
// Of several processes each writes what it holds, model.00000-of-00002.safetensors and so on
// (model/formats/piece_files.h); any number of processes can go on from them.
//
// A checkpoint is written under a name that starts with "partial_", made durable, and renamed.
// Nothing random is drawn after the initial weights (sample order is a function of the seed and the
// sample number), so there is no generator state to keep beside the seed in the configuration.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "train/checkpoint_tensors.h"
#include "train/manifest.h"
#include "train/optimizer.h"
#include "train/outlier_guard.h"
#include "train/run_config.h"
#include "train/run_folder.h"

namespace rwkv {

struct TrainerState {
  int64_t step = 0;      // steps done, skipped outliers included
  int64_t samples = 0;   // samples consumed: the next one has this number
  int64_t tokens = 0;    // tokens trained on
  std::string corpus;    // BinidxFile::fingerprint() of data.train; empty: unknown
  double elapsed_s = 0;  // seconds of training, those before restarts included
  OutlierGuard outliers = {};
  std::string initial_state = {};  // content_hash() of init.state; empty: none
};

// What all checkpoints of a run have in common.
struct CheckpointSettings {
  RunConfig config;  // its train.run_dir is where they go
  // Tokenizer::identity() of the corpus' tokenizer, if it is known.
  std::optional<std::string> tokenizer_identity = {};
  Retention retention = {};
};

// Writes the checkpoint of `state.step`, then deletes those that the retention does not keep and
// whatever an interrupted save left. Returns its path. Throws std::runtime_error naming the file
// and the reason, also if the disk has no room for it or a weight is not finite; nothing of the
// failed checkpoint is left, and no older one is deleted. An older one that cannot be deleted is a
// warning in the log.
std::string save_checkpoint(const CheckpointSettings& settings,
                            const CheckpointPieces& pieces,
                            const TrainerState& state);

// The same in three parts, for several processes with a barrier between one part and the next.
// First: one process makes the folder, after a look at whether `bytes` fit on the disk.
void begin_checkpoint(const CheckpointSettings& settings, int64_t step, uint64_t bytes);
// Second: every process writes its pieces there, and tells what it wrote. Throws std::runtime_error
// naming a weight that is not finite.
std::vector<ManifestFile> write_checkpoint_pieces(const CheckpointSettings& settings,
                                                  int64_t step,
                                                  const CheckpointPieces& pieces,
                                                  ProcessPlace place = {});
// Third: the one process, given `files` of all, completes the checkpoint and returns its path.
std::string finish_checkpoint(const CheckpointSettings& settings,
                              const TrainerState& state,
                              std::vector<ManifestFile> files,
                              int64_t num_processes = 1);
// In place of the third part, if the second failed in any process: removes what was written.
void abandon_checkpoint(const CheckpointSettings& settings, int64_t step);

// What a run may do whose numbers are not finite any more: a sentence or two.
std::string advice_where_not_finite(const std::string& run_dir);

// Throws the error of an update that left a weight not finite.
[[noreturn]] void refuse_nonfinite(const std::string& weight,
                                   int64_t step,
                                   const std::string& run_dir);

struct SavedRun {
  RunConfig config;
  TrainerState state;
};
// What a checkpoint says of its run. Throws std::runtime_error naming the file.
SavedRun read_saved_run(const std::string& checkpoint);
// Fills the optimizer from a checkpoint. Throws std::runtime_error naming file and tensor.
void load_optimizer(const std::string& checkpoint, const TrainerState& state, Optimizer& optimizer);

}  // namespace rwkv
