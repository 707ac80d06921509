// Checkpoints of a run: a folder each, complete or absent.
//
//   RUN/checkpoints/step_00000200/
//     model.safetensors      master weights, fp32, RWKV-LM's names; metadata "rookery.config" holds
//                            the resolved configuration, "rookery.tokenizer" the identity of the
//                            tokenizer that made the corpus, if it is known
//     optimizer.safetensors  AdamW's moments as m.<name> and v.<name>, fp32
//     trainer.json           step, tokens and samples seen: data position and schedule follow; the
//                            seconds that it took; the fingerprint of the corpus
//     config.toml            the resolved configuration
// A checkpoint is written under a name that starts with "partial_", made durable, and renamed.
// Nothing random is drawn after the initial weights (sample order is a function of the seed and the
// sample number), so there is no generator state to keep beside the seed in the configuration.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "train/optimizer.h"
#include "train/run_config.h"
#include "train/run_folder.h"

namespace rwkv {

struct TrainerState {
  int64_t step = 0;      // updates done
  int64_t samples = 0;   // samples consumed: the next one has this number
  int64_t tokens = 0;    // tokens trained on
  std::string corpus;    // BinidxFile::fingerprint() of data.train; empty: unknown
  double elapsed_s = 0;  // seconds of training, those before restarts included
};

// Writes the checkpoint of `state.step`, then deletes those that `retention` does not keep and
// whatever an interrupted save left. `tokenizer_identity` is Tokenizer::identity() of the corpus'
// tokenizer. Returns its path. Throws std::runtime_error naming the file and the reason; nothing of
// the failed checkpoint is left, and no older one is deleted. An older one that cannot be deleted
// is a warning in the log.
std::string save_checkpoint(const std::string& run_dir,
                            const RunConfig& config,
                            const std::optional<std::string>& tokenizer_identity,
                            const Optimizer& optimizer,
                            const TrainerState& state,
                            const Retention& retention);

struct SavedRun {
  RunConfig config;
  TrainerState state;
};
// What a checkpoint says of its run. Throws std::runtime_error naming the file.
SavedRun read_saved_run(const std::string& checkpoint);
// Fills the optimizer from a checkpoint. Throws std::runtime_error naming file and tensor.
void load_optimizer(const std::string& checkpoint, const TrainerState& state, Optimizer& optimizer);

}  // namespace rwkv
