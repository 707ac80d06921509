#include "train/run_folder.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/file.h>
#include <unistd.h>

#include "data/number_text.h"

namespace rwkv {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kStepPrefix = "step_";
constexpr std::string_view kPartialPrefix = "partial_";

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

// Renamed first: a checkpoint that is half deleted must not look like a whole one.
void delete_checkpoint(const fs::path& folder) {
  const fs::path doomed = folder.parent_path() / partial_name(folder.filename().string());
  fs::remove_all(doomed);
  fs::rename(folder, doomed);
  fs::remove_all(doomed);
}

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "an unknown host";
}

// What the program that holds a lock wrote into it.
std::string holder_of(int file) {
  std::array<char, 400> text{};
  const ssize_t size = pread(file, text.data(), text.size() - 1, 0);
  return size > 0 ? std::string(text.data(), static_cast<size_t>(size)) : "another program";
}

void require_space(const fs::path& folder, uint64_t free_bytes, uint64_t bytes) {
  // Headers, records and what the file system needs for itself.
  const uint64_t needed = bytes + bytes / 20;
  if (free_bytes < needed) {
    throw std::runtime_error(folder.string() + ": " + grouped(free_bytes) +
                             " bytes free, a checkpoint takes " + grouped(needed) +
                             " (the disk is full; free some, or lower train.keep_checkpoints)");
  }
}

uint64_t bytes_in(const fs::path& folder) {
  uint64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    bytes += entry.is_regular_file() ? entry.file_size() : 0;
  }
  return bytes;
}

// Does nothing where there is no damage.
void refuse_damaged(const std::string& checkpoint, const std::string& damage) {
  if (damage.empty()) {
    return;
  }
  const fs::path folder(checkpoint);
  const auto checkpoints = list_checkpoints(folder.parent_path().parent_path().string());
  const auto older = std::find_if(checkpoints.rbegin(), checkpoints.rend(), [&](const auto& found) {
    return found.first < step_of(folder).value_or(0) &&
           find_damage(found.second.string(), Scrutiny::kWeights).empty();
  });
  throw std::runtime_error(
      damage +
      (older == checkpoints.rend()
           ? "; no older checkpoint is whole beside it: copy the file there again"
           : "; name an older checkpoint, the newest whole one is " + older->second.string()));
}

}  // namespace

fs::path checkpoints_folder(const std::string& run_dir) {
  return fs::path(run_dir) / "checkpoints";
}

std::string checkpoint_name(int64_t step) {
  const std::string digits = std::to_string(step);
  return std::string(kStepPrefix) + std::string(8 - std::min<size_t>(8, digits.size()), '0') +
         digits;
}

std::string partial_name(const std::string& checkpoint_name) {
  return std::string(kPartialPrefix) + checkpoint_name;
}

std::optional<std::string> newest_checkpoint(const std::string& run_dir,
                                             std::optional<int64_t> before_step) {
  std::optional<std::string> newest;
  for (const auto& [step, folder] : list_checkpoints(run_dir)) {
    if (!before_step || step < *before_step) {
      newest = folder.string();
    }
  }
  return newest;
}

WholeCheckpoint newest_whole_checkpoint(const std::string& run_dir,
                                        Scrutiny scrutiny,
                                        std::optional<int64_t> before_step) {
  WholeCheckpoint result;
  auto checkpoints = list_checkpoints(run_dir);
  std::erase_if(checkpoints,
                [&](const auto& found) { return before_step && found.first >= *before_step; });
  for (auto found = checkpoints.rbegin(); found != checkpoints.rend(); ++found) {
    std::string damage = find_damage(found->second.string(), scrutiny);
    if (damage.empty()) {
      result.path = found->second.string();
      return result;
    }
    result.refused.push_back(std::move(damage));
  }
  if (!result.refused.empty()) {
    throw std::runtime_error(
        result.refused.front() + "; " +
        (checkpoints.size() == 1
             ? "there is no other checkpoint in "
             : "none of the " + std::to_string(checkpoints.size()) + " checkpoints is whole in ") +
        checkpoints_folder(run_dir).string() +
        ". Copy one there again, or delete that folder to train from the start");
  }
  return result;
}

void delete_old_checkpoints(const std::string& run_dir,
                            int64_t saved_step,
                            const Retention& retention) {
  auto checkpoints = list_checkpoints(run_dir);
  std::erase_if(checkpoints, [&](const auto& found) { return found.first > saved_step; });
  int64_t kept = 0;
  for (auto found = checkpoints.rbegin(); found != checkpoints.rend(); ++found) {
    const auto& [step, folder] = *found;
    if (kept < retention.newest) {
      kept += find_damage(folder.string(), Scrutiny::kSizes).empty() ? 1 : 0;
    } else if (!retention.every_steps || step % *retention.every_steps != 0) {
      delete_checkpoint(folder);
    }
  }
  for (const auto& entry : fs::directory_iterator(checkpoints_folder(run_dir))) {
    if (entry.path().filename().string().starts_with(kPartialPrefix)) {
      fs::remove_all(entry.path());
    }
  }
}

void require_writable_checkpoints(const std::string& run_dir) {
  const fs::path folder = checkpoints_folder(run_dir);
  const fs::path probe = folder / partial_name("probe");
  std::error_code error;
  fs::create_directories(probe, error);
  if (error) {
    throw std::runtime_error(folder.string() + ": no checkpoint can be made there: " +
                             error.message() + "; name another train.run_dir");
  }
  fs::remove(probe);
}

void require_space_for_checkpoint(const std::string& run_dir, uint64_t bytes) {
  const fs::path folder = checkpoints_folder(run_dir);
  require_space(folder, fs::space(folder).available, bytes);
}

void require_space_for_next_checkpoint(const std::string& run_dir) {
  const auto newest = newest_checkpoint(run_dir);
  if (!newest) {
    return;
  }
  require_writable_checkpoints(run_dir);
  const fs::path folder = checkpoints_folder(run_dir);
  uint64_t free_bytes = fs::space(folder).available;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().filename().string().starts_with(kPartialPrefix)) {
      free_bytes += bytes_in(entry.path());
    }
  }
  require_space(folder, free_bytes, bytes_in(*newest));
}

std::string find_model(const std::string& path, Scrutiny scrutiny) {
  if (!fs::is_directory(checkpoints_folder(path))) {
    return path;
  }
  const auto newest = newest_checkpoint(path);
  if (!newest) {
    throw std::runtime_error(checkpoints_folder(path).string() +
                             ": holds no checkpoint yet, expected folders step_...; train first");
  }
  refuse_damaged(*newest, find_damage(*newest, scrutiny));
  return *newest;
}

void require_whole_model(const std::string& path) {
  refuse_damaged(path, find_damage_of_model(path));
}

RunConfig parse_kept_config(const std::string& text, const std::string& name) {
  try {
    return parse_run_config(text, name);
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(error.what());
  }
}

std::optional<RunConfig> config_in(const WeightFile& file) {
  const auto found = file.metadata.find(kRunConfigKey);
  if (found == file.metadata.end()) {
    return std::nullopt;
  }
  return parse_kept_config(found->second, file.path + " (" + kRunConfigKey + ")");
}

std::optional<std::string> tokenizer_identity_in(const WeightFile& file) {
  const auto found = file.metadata.find(kTokenizerKey);
  if (found == file.metadata.end()) {
    return std::nullopt;
  }
  return found->second;
}

RunLock::RunLock(const std::string& run_dir) {
  std::error_code error;
  fs::create_directories(run_dir, error);
  if (error) {
    throw std::runtime_error(run_dir + ": cannot be made the run's folder: " + error.message() +
                             "; name another train.run_dir");
  }
  const std::string path = (fs::path(run_dir) / "lock").string();
  file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (file_ < 0) {
    throw std::runtime_error(path + ": cannot be opened for writing: " + std::strerror(errno) +
                             "; name another train.run_dir");
  }
  const bool locked = flock(file_, LOCK_EX | LOCK_NB) == 0;
  if (!locked && errno != EWOULDBLOCK) {
    spdlog::warn("{}: this file system has no locks ({}); a second run in {} would not be refused",
                 path,
                 std::strerror(errno),
                 run_dir);
  } else if (!locked) {
    const std::string holder = holder_of(file_);
    close(file_);
    throw std::runtime_error(run_dir + ": " + holder +
                             " trains in this folder, and two would spoil each other's files; "
                             "wait for its end, or name another train.run_dir");
  }
  const std::string holder = "process " + std::to_string(getpid()) + " on " + host_name();
  // Only for the text above: a lock that cannot say who holds it still locks.
  if (ftruncate(file_, 0) != 0 || pwrite(file_, holder.data(), holder.size(), 0) < 0) {
    return;
  }
}

RunLock::~RunLock() {
  // Nobody holds it any more; that it says so is a courtesy.
  [[maybe_unused]] const int ignored = ftruncate(file_, 0);
  close(file_);
}

}  // namespace rwkv
