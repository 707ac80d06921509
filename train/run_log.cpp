#include "train/run_log.h"

#include <algorithm>
#include <filesystem>
#include <numeric>
#include <utility>

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>
#include <unistd.h>

namespace rwkv {
namespace {

std::string file_in(const RunConfig& config, const char* name) {
  return (std::filesystem::path(config.train.run_dir) / name).string();
}

}  // namespace

RunLog::RunLog(const RunConfig& config, int64_t resumed_step, double time)
    : metrics_(file_in(config, "metrics.jsonl"), resumed_step),
      starts_(file_in(config, "starts.jsonl"), resumed_step),
      line_(STDERR_FILENO) {
  if (config.sample.every_steps) {
    samples_.emplace(file_in(config, "samples.jsonl"), resumed_step);
  }
  if (config.train.skip_outliers_z) {
    skipped_.emplace(file_in(config, "skipped.jsonl"), resumed_step);
  }
  if (config.train.tensorboard) {
    events_.emplace(file_in(config, "tensorboard"), resumed_step, time);
  }
}

std::optional<SmoothedLoss> RunLog::smoothed_loss() const {
  const auto row =
      nlohmann::json::parse(metrics_.last_kept_line(), nullptr, /*allow_exceptions=*/false);
  // A row of another release may lack it.
  if (!row.is_object() || !row.contains("smoothed_loss") || !row["smoothed_loss"].is_number()) {
    return std::nullopt;
  }
  return SmoothedLoss{.step = row.at("step"), .value = row.at("smoothed_loss")};
}

void RunLog::add_start(const std::string& json) {
  starts_.append(nlohmann::json::parse(json).at("step"), json);
}

void RunLog::show(const StepRecord& record) {
  line_.draw(format_step_line(record, line_.width()));
  shown_ = record;
}

void RunLog::add_shown() {
  if (shown_) {
    add(*std::exchange(shown_, std::nullopt));
  }
}

void RunLog::add(const StepRecord& record) {
  shown_.reset();
  metrics_.append(record.step, to_json(record));
  say(format_step_line(record));
  if (!events_) {
    return;
  }
  const auto scalar = [&](const char* tag, const std::optional<double>& value) {
    if (value) {
      events_->scalar(tag, record.step, record.time, *value);
    }
  };
  scalar("loss/train", record.loss);
  scalar("loss/train_smoothed", record.smoothed_loss);
  scalar("loss/validation", record.validation_loss);
  scalar("optimizer/lr", record.lr);
  scalar("optimizer/grad_norm", record.grad_norm);
  scalar("speed/tokens_per_s", record.tokens_per_s);
  scalar("speed/mfu", record.mfu);
  scalar("speed/data_wait", record.data_wait);
  scalar("progress/tokens", static_cast<double>(record.tokens));
  if (record.memory_bytes) {
    scalar("memory/bytes", static_cast<double>(*record.memory_bytes));
  }
  if (record.telemetry) {
    add_events(*record.telemetry, record.step, record.time);
  }
  events_->flush();
}

void RunLog::add_events(const Telemetry& telemetry, int64_t step, double time) {
  events_->scalar("telemetry/largest_logit", step, time, telemetry.largest_logit);
  for (const auto& [name, values] : telemetry.by_layer) {
    for (size_t layer = 0; layer < values.size(); ++layer) {
      const std::vector<double>& heads = values[layer];
      const std::string place = "/layer_" + std::to_string(layer);
      const double sum = std::accumulate(heads.begin(), heads.end(), 0.0);
      events_->scalar("telemetry/" + name + "_mean" + place,
                      step,
                      time,
                      sum / static_cast<double>(heads.size()));
      events_->scalar("telemetry/" + name + "_max" + place,
                      step,
                      time,
                      *std::max_element(heads.begin(), heads.end()));
    }
  }
}

void RunLog::add_sample(const StepRecord& record,
                        const std::string& prompt,
                        const std::string& text) {
  const nlohmann::ordered_json line = {
      {"step", record.step}, {"tokens", record.tokens}, {"prompt", prompt}, {"text", text}};
  // A text may be cut inside of a character, and a young model writes bytes that are no text.
  samples_.value().append(
      record.step, line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
  if (events_) {
    events_->text("sample", record.step, record.time, prompt + text);
    events_->flush();
  }
}

void RunLog::add_skipped(const SkippedStep& skipped, double time) {
  skipped_.value().append(skipped.step, to_json(skipped, time));
  line_.clear();
  spdlog::warn("{}: not applied", describe(skipped));
}

void RunLog::say(const std::string& text) {
  line_.clear();
  spdlog::info("{}", text);
}

}  // namespace rwkv
