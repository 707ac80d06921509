#include "train/checkpoint.h"

#include <filesystem>
#include <map>
#include <span>
#include <stdexcept>
#include <system_error>
#include <utility>

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "data/atomic_file.h"
#include "data/content_hash.h"
#include "data/json_text.h"
#include "train/version.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxStateBytes = size_t{1} << 20;

ManifestFile write_text(const fs::path& folder, const char* name, const std::string& text) {
  AtomicFile file((folder / name).string());
  file.write(text);
  file.commit();
  return {
      .name = name, .bytes = text.size(), .checksum = content_hash(std::as_bytes(std::span(text)))};
}

fs::path partial_path(const CheckpointSettings& settings, int64_t step) {
  return checkpoints_folder(settings.config.train.run_dir) / partial_name(checkpoint_name(step));
}

// Checkpoints are of whole steps: what does not fit together would train on other samples unseen.
void check_state(const SavedRun& saved, const std::string& path) {
  const TrainerState& state = saved.state;
  const auto is_steps_of = [&](int64_t count, int64_t per_step) {
    return count % per_step == 0 && count / per_step == state.step;
  };
  const int64_t samples = saved.config.batch_sequences();
  const int64_t tokens = saved.config.tokens_per_step();
  if (state.step < 0 || !is_steps_of(state.samples, samples) ||
      !is_steps_of(state.tokens, tokens)) {
    throw std::runtime_error(
        path + ": step " + std::to_string(state.step) + " after " + std::to_string(state.samples) +
        " samples and " + std::to_string(state.tokens) + " tokens, expected " +
        std::to_string(samples) + " and " + std::to_string(tokens) + " of them a step");
  }
  const int64_t skipped = state.outliers.num_skipped();
  if (skipped < 0 || skipped > state.step) {
    throw std::runtime_error(path + ": " + std::to_string(skipped) +
                             " steps were skipped, expected 0 to " + std::to_string(state.step));
  }
}

// Calls `read`; its errors say what to do about a checkpoint that is no longer whole.
template <typename Read>
auto read_whole(const Read& read) {
  try {
    return read();
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string(error.what()) +
                             "; delete the checkpoint to go on from the one before");
  }
}

SavedRun read_saved(const std::string& checkpoint) {
  const std::string config_path = (fs::path(checkpoint) / "config.toml").string();
  const std::string state_path = (fs::path(checkpoint) / "trainer.json").string();
  SavedRun saved{.config = parse_kept_config(read_text_file(config_path), config_path),
                 .state = {}};
  try {
    const nlohmann::json json = parse_json(
        read_text_file(state_path, kMaxStateBytes), state_path, "expected the state of a trainer");
    for (const char* key : {"step", "samples", "tokens"}) {
      if (!json.at(key).is_number_integer()) {
        throw std::runtime_error(state_path + ": " + key + " is " + shown_json(json.at(key)) +
                                 ", expected a whole number");
      }
    }
    saved.state = {.step = json.at("step"),
                   .samples = json.at("samples"),
                   .tokens = json.at("tokens"),
                   .corpus = json.value("corpus", ""),
                   .elapsed_s = json.value("elapsed_s", 0.0),
                   .outliers = json.contains("outliers")
                                   ? OutlierGuard::from_json(json.at("outliers"))
                                   : OutlierGuard(),
                   .initial_state = json.value("initial_state", "")};
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(state_path + ": not the state of a trainer: " + error.what());
  }
  check_state(saved, state_path);
  return saved;
}

}  // namespace

void begin_checkpoint(const CheckpointSettings& settings, int64_t step, uint64_t bytes) {
  const fs::path partial = partial_path(settings, step);
  fs::create_directories(partial.parent_path());
  fs::remove_all(partial);
  require_space_for_checkpoint(settings.config.train.run_dir, bytes);
  fs::create_directory(partial);
}

std::vector<ManifestFile> write_checkpoint_pieces(const CheckpointSettings& settings,
                                                  int64_t step,
                                                  const CheckpointPieces& pieces,
                                                  ProcessPlace place) {
  if (const std::string weight = first_nonfinite(pieces.weights); !weight.empty()) {
    refuse_nonfinite(weight, step, settings.config.train.run_dir);
  }
  const fs::path partial = partial_path(settings, step);
  if (place.rank > 0 && !fs::is_directory(partial)) {
    throw std::runtime_error(partial.string() +
                             ": is not there, though rank 0 has made it; "
                             "train.run_dir must lie where all processes see the same files");
  }
  std::vector<ManifestFile> files;
  const auto write = [&](const char* stem,
                         const std::vector<TensorPiece>& tensors,
                         const std::map<std::string, std::string>& metadata) {
    const std::string name = piece_file_name(stem, place);
    const WrittenFile written =
        write_pieces((partial / name).string(), to_write(tensors), metadata);
    files.push_back({.name = name, .bytes = written.bytes, .checksum = written.checksum});
  };
  std::map<std::string, std::string> metadata{{"format", "pt"},
                                              {kRunConfigKey, to_toml(settings.config)}};
  if (settings.tokenizer_identity) {
    metadata.emplace(kTokenizerKey, *settings.tokenizer_identity);
  }
  write("model", pieces.weights, metadata);
  write("optimizer", pieces.moments, {});
  return files;
}

std::string finish_checkpoint(const CheckpointSettings& settings,
                              const TrainerState& state,
                              std::vector<ManifestFile> files,
                              int64_t num_processes) {
  const std::string& run_dir = settings.config.train.run_dir;
  const fs::path folder = checkpoints_folder(run_dir);
  const fs::path final_path = folder / checkpoint_name(state.step);
  const fs::path partial = partial_path(settings, state.step);
  nlohmann::ordered_json progress = {{"step", state.step},
                                     {"samples", state.samples},
                                     {"tokens", state.tokens},
                                     {"corpus", state.corpus},
                                     {"elapsed_s", state.elapsed_s},
                                     {"processes", num_processes}};
  if (!state.outliers.is_empty()) {
    progress["outliers"] = state.outliers.to_json();
  }
  if (!state.initial_state.empty()) {
    progress["initial_state"] = state.initial_state;
  }
  files.push_back(write_text(partial, "trainer.json", progress.dump(2) + "\n"));
  files.push_back(write_text(partial, "config.toml", to_toml(settings.config)));
  write_text(partial,
             kManifestName,
             to_json({.step = state.step,
                      .processes = num_processes,
                      .version = rookery_version(),
                      .files = std::move(files)}));
  // A run that went on from an older checkpoint comes past this step again.
  fs::remove_all(final_path);
  fs::rename(partial, final_path);
  sync_folder(folder.string());
  try {
    delete_old_checkpoints(run_dir, state.step, settings.retention);
  } catch (const fs::filesystem_error& error) {
    // The new one is there: no reason to end the run.
    spdlog::warn("{}: an old checkpoint cannot be deleted: {}",
                 error.path1().string(),
                 error.code().message());
  }
  return final_path.string();
}

void abandon_checkpoint(const CheckpointSettings& settings, int64_t step) {
  std::error_code ignored;
  fs::remove_all(partial_path(settings, step), ignored);
}

std::string save_checkpoint(const CheckpointSettings& settings,
                            const CheckpointPieces& pieces,
                            const TrainerState& state) {
  try {
    begin_checkpoint(settings, state.step, bytes_of(pieces));
    return finish_checkpoint(
        settings, state, write_checkpoint_pieces(settings, state.step, pieces));
  } catch (...) {
    abandon_checkpoint(settings, state.step);
    throw;
  }
}

std::string advice_where_not_finite(const std::string& run_dir) {
  const auto newest = newest_checkpoint(run_dir);
  // The schedule and clipping of a run that has a checkpoint cannot be changed.
  return (newest ? "The newest checkpoint is " + *newest + "; a new run with init.from = that and"
                 : std::string("There is no checkpoint yet;")) +
         " a lower schedule.lr_init or optimizer.clip_norm may get past it";
}

void refuse_nonfinite(const std::string& weight, int64_t step, const std::string& run_dir) {
  throw std::runtime_error("step " + std::to_string(step) + ": its update left " + weight +
                           " not finite, so it is not saved. " + advice_where_not_finite(run_dir));
}

SavedRun read_saved_run(const std::string& checkpoint) {
  SavedRun saved = read_whole([&] { return read_saved(checkpoint); });
  // The name decides which is the newest.
  const std::string name = checkpoint_name(saved.state.step);
  if (fs::path(checkpoint).filename() != name) {
    throw std::runtime_error(checkpoint + ": holds step " + std::to_string(saved.state.step) +
                             ", so it should be called " + name + "; give it that name again");
  }
  return saved;
}

void load_optimizer(const std::string& checkpoint,
                    const TrainerState& state,
                    Optimizer& optimizer) {
  read_whole([&] {
    optimizer.load(open_checkpoint(checkpoint), state.step - state.outliers.num_skipped());
  });
}

}  // namespace rwkv
