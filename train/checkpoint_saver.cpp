#include "train/checkpoint_saver.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <utility>

#include <ATen/ATen.h>
#include <c10/util/ScopeExit.h>

#include <nlohmann/json.hpp>
#include <spdlog/fmt/fmt.h>
#include <spdlog/spdlog.h>

namespace rwkv {
namespace {

double now_seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

// A note is what `work` returns, or what it throws.
template <typename Work>
std::string note_of(const Work& work) {
  try {
    return nlohmann::json{{"result", work()}}.dump();
  } catch (const std::exception& error) {
    return nlohmann::json{{"error", error.what()}}.dump(
        -1, ' ', false, nlohmann::json::error_handler_t::replace);
  }
}

nlohmann::json result_of(const std::string& note) {
  const nlohmann::json json = nlohmann::json::parse(note);
  if (json.contains("error")) {
    throw std::runtime_error(json.at("error").get<std::string>());
  }
  return json.at("result");
}

nlohmann::json to_json(const std::vector<ManifestFile>& files) {
  nlohmann::json json = nlohmann::json::array();
  for (const ManifestFile& file : files) {
    json.push_back({file.name, file.bytes, file.checksum});
  }
  return json;
}

std::vector<ManifestFile> manifest_files_of(const nlohmann::json& json) {
  std::vector<ManifestFile> files;
  for (const nlohmann::json& file : json) {
    files.push_back({.name = file.at(0), .bytes = file.at(1), .checksum = file.at(2)});
  }
  return files;
}

// Name of the note that a process leaves about its share.
std::string written_by(const std::string& save, int64_t rank) {
  return save + "written/" + std::to_string(rank);
}

}  // namespace

std::string describe(const SavedCheckpoint& saved) {
  return fmt::format(
      "saved {} in {:.2f} s (training waited {:.2f} s)", saved.path, saved.save_s, saved.wait_s);
}

CheckpointSaver::CheckpointSaver(CheckpointSettings settings, Communicator* communicator)
    : settings_(std::move(settings)), communicator_(communicator) {}

CheckpointSaver::~CheckpointSaver() {
  try {
    if (const auto saved = wait()) {
      spdlog::info("{}", describe(*saved));
    }
  } catch (const std::exception& error) {
    spdlog::error("{}", error.what());
  }
}

void CheckpointSaver::start(const Optimizer& optimizer, const TrainerState& state) {
  TORCH_CHECK(!saving_.valid(), "step ", state.step, " is saved while another save is under way");
  const double start_s = now_seconds();
  wait_s_ = 0;
  auto copied = std::make_shared<std::promise<void>>();
  copied_ = copied->get_future().share();
  // A device's work is in queues that belong to this thread.
  const bool is_device = !optimizer.control().is_cpu();
  if (is_device) {
    optimizer.copy_state(pieces_);
  }
  saving_ = std::async(std::launch::async, [=, this, from = &optimizer] {
              // Whether or not the copy succeeds: nobody may wait for it for ever.
              const auto copy = [&] {
                const auto done = c10::make_scope_exit([&] { copied->set_value(); });
                if (!is_device) {
                  from->copy_state(pieces_);
                }
              };
              copy();
              const std::string path = communicator_ == nullptr
                                           ? save_checkpoint(settings_, pieces_, state)
                                           : save_together(state);
              return SavedCheckpoint{.path = path, .save_s = now_seconds() - start_s};
            }).share();
  wait_s_ += now_seconds() - start_s;
}

std::string CheckpointSaver::save_together(const TrainerState& state) {
  const std::string save = "save/" + std::to_string(state.step) + "/";
  const int64_t processes = communicator_->world_size();
  const bool is_first = communicator_->rank() == 0;
  if (is_first) {
    const uint64_t bytes = bytes_of(pieces_) * static_cast<uint64_t>(processes);
    communicator_->leave_note(save + "begun", note_of([&] {
                                begin_checkpoint(settings_, state.step, bytes);
                                return nlohmann::json();
                              }));
  }
  result_of(communicator_->read_note(save + "begun", "the begin of a save"));
  communicator_->leave_note(written_by(save, communicator_->rank()),
                            note_of([&] { return to_json(write_own(state.step)); }));
  if (is_first) {
    communicator_->leave_note(save + "done", note_of([&] { return complete(state, save); }));
    for (const std::string& note : old_notes_) {
      communicator_->remove_note(note);
    }
    old_notes_ = {save + "begun", save + "done"};
    for (int64_t rank = 0; rank < processes; ++rank) {
      old_notes_.push_back(written_by(save, rank));
    }
  }
  return result_of(communicator_->read_note(save + "done", "the end of a save"));
}

std::string CheckpointSaver::complete(const TrainerState& state, const std::string& save) {
  try {
    return finish_checkpoint(settings_, state, files_of_all(save), communicator_->world_size());
  } catch (...) {
    abandon_checkpoint(settings_, state.step);
    throw;
  }
}

// Hears all, also after one has failed: while anybody writes, nothing can be taken away.
std::vector<ManifestFile> CheckpointSaver::files_of_all(const std::string& save) {
  std::vector<ManifestFile> files;
  std::exception_ptr failure;
  for (int64_t rank = 0; rank < communicator_->world_size(); ++rank) {
    const std::string note =
        communicator_->read_note(written_by(save, rank), "the wait for a share of a save");
    try {
      std::ranges::move(manifest_files_of(result_of(note)), std::back_inserter(files));
    } catch (...) {
      failure = failure == nullptr ? std::current_exception() : failure;
    }
  }
  if (failure != nullptr) {
    std::rethrow_exception(failure);
  }
  return files;
}

std::vector<ManifestFile> CheckpointSaver::write_own(int64_t step) {
  const ProcessPlace place{.rank = communicator_->rank(),
                           .num_processes = communicator_->world_size()};
  try {
    return write_checkpoint_pieces(settings_, step, pieces_, place);
  } catch (const std::exception& error) {
    throw std::runtime_error("rank " + std::to_string(place.rank) +
                             " cannot write its share of the checkpoint: " + error.what());
  }
}

void CheckpointSaver::wait_for_copy() {
  if (copied_.valid()) {
    const double start_s = now_seconds();
    copied_.wait();
    wait_s_ += now_seconds() - start_s;
  }
}

std::optional<SavedCheckpoint> CheckpointSaver::take_saved() {
  if (!saving_.valid() || saving_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    return std::nullopt;
  }
  SavedCheckpoint saved = std::exchange(saving_, {}).get();
  saved.wait_s = wait_s_;
  return saved;
}

std::optional<SavedCheckpoint> CheckpointSaver::wait() {
  settle();
  return take_saved();
}

void CheckpointSaver::settle() {
  try {
    if (saving_.valid()) {
      const double start_s = now_seconds();
      saving_.get();
      wait_s_ += now_seconds() - start_s;
    }
  } catch (...) {
    saving_ = {};
    throw;
  }
}

}  // namespace rwkv
