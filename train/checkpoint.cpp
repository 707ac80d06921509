#include "train/checkpoint.h"

#include <filesystem>
#include <map>
#include <stdexcept>

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "data/atomic_file.h"
#include "data/json_text.h"
#include "model/formats/format_registry.h"
#include "model/formats/safetensors.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxStateBytes = size_t{1} << 20;

void write_text(const fs::path& path, const std::string& text) {
  AtomicFile file(path.string());
  file.write(text);
  file.commit();
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
                   .elapsed_s = json.value("elapsed_s", 0.0)};
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(state_path + ": not the state of a trainer: " + error.what());
  }
  check_state(saved, state_path);
  return saved;
}

}  // namespace

std::string save_checkpoint(const std::string& run_dir,
                            const RunConfig& config,
                            const std::optional<std::string>& tokenizer_identity,
                            const Optimizer& optimizer,
                            const TrainerState& state,
                            const Retention& retention) {
  const fs::path folder = checkpoints_folder(run_dir);
  const fs::path final_path = folder / checkpoint_name(state.step);
  const fs::path partial = folder / partial_name(checkpoint_name(state.step));
  try {
    fs::create_directories(folder);
    fs::remove_all(partial);
    fs::create_directory(partial);
    const std::string config_text = to_toml(config);
    const NamedTensors weights = optimizer.master_weights();
    const NamedTensors moments = optimizer.moments();
    std::map<std::string, std::string> metadata{{"format", "pt"}, {kRunConfigKey, config_text}};
    if (tokenizer_identity) {
      metadata.emplace(kTokenizerKey, *tokenizer_identity);
    }
    write_safetensors((partial / "model.safetensors").string(), to_write(weights), metadata);
    write_safetensors((partial / "optimizer.safetensors").string(), to_write(moments), {});
    const nlohmann::ordered_json progress = {{"step", state.step},
                                             {"samples", state.samples},
                                             {"tokens", state.tokens},
                                             {"corpus", state.corpus},
                                             {"elapsed_s", state.elapsed_s}};
    write_text(partial / "trainer.json", progress.dump(2) + "\n");
    write_text(partial / "config.toml", config_text);
    // A run that went on from an older checkpoint comes past this step again.
    fs::remove_all(final_path);
    fs::rename(partial, final_path);
    sync_folder(folder.string());
  } catch (...) {
    std::error_code ignored;
    fs::remove_all(partial, ignored);
    throw;
  }
  try {
    delete_old_checkpoints(run_dir, state.step, retention);
  } catch (const fs::filesystem_error& error) {
    // The new one is there: no reason to end the run.
    spdlog::warn("{}: an old checkpoint cannot be deleted: {}",
                 error.path1().string(),
                 error.code().message());
  }
  return final_path.string();
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
    optimizer.load(read_safetensors((fs::path(checkpoint) / "model.safetensors").string()),
                   read_safetensors((fs::path(checkpoint) / "optimizer.safetensors").string()),
                   state.step);
  });
}

}  // namespace rwkv
