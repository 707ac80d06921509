#include "train/checkpoint.h"

#include <algorithm>
#include <filesystem>
#include <stdexcept>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/atomic_file.h"
#include "model/formats/format_registry.h"
#include "model/formats/safetensors.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStepPrefix = "step_";
constexpr std::string_view kPartialPrefix = "partial_";
constexpr const char* kConfigKey = "rookery.config";

fs::path checkpoints_folder(const std::string& run_dir) {
  return fs::path(run_dir) / "checkpoints";
}

std::string folder_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return std::string(kStepPrefix) + std::string(8 - std::min<size_t>(8, digits.size()), '0') +
         digits;
}

// Step of a checkpoint's folder; nothing if the name is another.
std::optional<int64_t> step_of(const fs::path& folder) {
  const std::string name = folder.filename().string();
  const std::string digits = name.substr(std::min(kStepPrefix.size(), name.size()));
  if (!name.starts_with(kStepPrefix) || digits.empty() || digits.size() > 18 ||
      digits.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  return std::stoll(digits);
}

// Complete checkpoints in order of their steps.
std::vector<std::pair<int64_t, fs::path>> list_checkpoints(const std::string& run_dir) {
  std::vector<std::pair<int64_t, fs::path>> found;
  const fs::path folder = checkpoints_folder(run_dir);
  if (fs::is_directory(folder)) {
    for (const auto& entry : fs::directory_iterator(folder)) {
      if (const auto step = step_of(entry.path()); step && entry.is_directory()) {
        found.emplace_back(*step, entry.path());
      }
    }
  }
  std::sort(found.begin(), found.end());
  return found;
}

void write_text(const fs::path& path, const std::string& text) {
  AtomicFile file(path.string());
  file.write(text);
  file.commit();
}

void delete_old(const std::string& run_dir, int64_t keep) {
  auto checkpoints = list_checkpoints(run_dir);
  while (static_cast<int64_t>(checkpoints.size()) > keep) {
    // Renamed first: a checkpoint that is half deleted must not look like a whole one.
    const fs::path folder = checkpoints.front().second;
    const fs::path doomed =
        folder.parent_path() / (std::string(kPartialPrefix) + folder.filename().string());
    fs::remove_all(doomed);
    fs::rename(folder, doomed);
    checkpoints.erase(checkpoints.begin());
  }
  for (const auto& entry : fs::directory_iterator(checkpoints_folder(run_dir))) {
    if (entry.path().filename().string().starts_with(kPartialPrefix)) {
      fs::remove_all(entry.path());
    }
  }
}

// A configuration kept in a file of ours: what is wrong with it is the file's fault, not the
// user's.
RunConfig parse_kept_config(const std::string& text, const std::string& name) {
  try {
    return parse_run_config(text, name);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(error.what());
  }
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
    throw std::runtime_error(path + ": step " + std::to_string(state.step) + " after " +
                             std::to_string(state.samples) + " samples and " +
                             std::to_string(state.tokens) + " tokens, expected " +
                             std::to_string(samples) + " and " + std::to_string(tokens) +
                             " of them a step; delete the checkpoint to go on from the one before");
  }
}

}  // namespace

std::string save_checkpoint(const std::string& run_dir,
                            const RunConfig& config,
                            const Optimizer& optimizer,
                            const TrainerState& state,
                            int64_t keep) {
  const fs::path folder = checkpoints_folder(run_dir);
  const fs::path final_path = folder / folder_name(state.step);
  const fs::path partial = folder / (std::string(kPartialPrefix) + folder_name(state.step));
  try {
    fs::create_directories(folder);
    fs::remove_all(partial);
    fs::create_directory(partial);
    const std::string config_text = to_toml(config);
    const NamedTensors weights = optimizer.master_weights();
    const NamedTensors moments = optimizer.moments();
    write_safetensors((partial / "model.safetensors").string(),
                      to_write(weights),
                      {{"format", "pt"}, {kConfigKey, config_text}});
    write_safetensors((partial / "optimizer.safetensors").string(), to_write(moments), {});
    write_text(
        partial / "trainer.json",
        nlohmann::json{{"step", state.step}, {"samples", state.samples}, {"tokens", state.tokens}}
                .dump(2) +
            "\n");
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
  delete_old(run_dir, keep);
  return final_path.string();
}

std::optional<std::string> newest_checkpoint(const std::string& run_dir) {
  const auto checkpoints = list_checkpoints(run_dir);
  if (checkpoints.empty()) {
    return std::nullopt;
  }
  return checkpoints.back().second.string();
}

SavedRun read_saved_run(const std::string& checkpoint) {
  const std::string config_path = (fs::path(checkpoint) / "config.toml").string();
  const std::string state_path = (fs::path(checkpoint) / "trainer.json").string();
  SavedRun saved{.config = parse_kept_config(read_text_file(config_path), config_path),
                 .state = {}};
  try {
    const auto json = nlohmann::json::parse(read_text_file(state_path));
    saved.state = {
        .step = json.at("step"), .samples = json.at("samples"), .tokens = json.at("tokens")};
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(state_path + ": not the state of a trainer: " + error.what());
  }
  check_state(saved, state_path);
  return saved;
}

void load_optimizer(const std::string& checkpoint,
                    const TrainerState& state,
                    Optimizer& optimizer) {
  optimizer.load(read_safetensors((fs::path(checkpoint) / "model.safetensors").string()),
                 read_safetensors((fs::path(checkpoint) / "optimizer.safetensors").string()),
                 state.step);
}

std::string find_model(const std::string& path) {
  if (!fs::is_directory(checkpoints_folder(path))) {
    return path;
  }
  const auto newest = newest_checkpoint(path);
  if (!newest) {
    throw std::runtime_error(checkpoints_folder(path).string() +
                             ": holds no checkpoint yet, expected folders step_...; train first");
  }
  return *newest;
}

std::optional<RunConfig> config_in(const WeightFile& file) {
  const auto found = file.metadata.find(kConfigKey);
  if (found == file.metadata.end()) {
    return std::nullopt;
  }
  return parse_kept_config(found->second, file.path + " (" + kConfigKey + ")");
}

}  // namespace rwkv
