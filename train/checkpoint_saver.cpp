#include "train/checkpoint_saver.h"

#include <chrono>
#include <exception>
#include <utility>

#include <ATen/ATen.h>

#include <spdlog/spdlog.h>

namespace rwkv {

CheckpointSaver::CheckpointSaver(CheckpointSettings settings) : settings_(std::move(settings)) {}

CheckpointSaver::~CheckpointSaver() {
  try {
    if (const auto path = wait()) {
      spdlog::info("saved {}", *path);
    }
  } catch (const std::exception& error) {
    spdlog::error("{}", error.what());
  }
}

void CheckpointSaver::start(const Optimizer& optimizer, const TrainerState& state) {
  TORCH_CHECK(!saving_.valid(), "step ", state.step, " is saved while another save is under way");
  optimizer.copy_state(pieces_);
  saving_ = std::async(std::launch::async,
                       [this, state] { return save_checkpoint(settings_, pieces_, state); });
}

std::optional<std::string> CheckpointSaver::take_saved() {
  if (!saving_.valid() || saving_.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    return std::nullopt;
  }
  return saving_.get();
}

std::optional<std::string> CheckpointSaver::wait() {
  settle();
  return take_saved();
}

void CheckpointSaver::settle() const {
  if (saving_.valid()) {
    saving_.wait();
  }
}

}  // namespace rwkv
