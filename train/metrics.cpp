#include "train/metrics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include "data/atomic_file.h"

namespace rwkv {
namespace {

// About the last 50 steps count: enough to see a trend of 1 % in a loss that jumps by 10 %.
constexpr double kLossDecay = 0.98;
// Steps over which the speed is measured: short enough to show a change, long enough to be calm.
constexpr size_t kSpeedWindow = 32;

template <typename... Args>
std::string printf_text(const char* format, Args... args) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), format, args...);
  return buffer.data();
}

std::string with_thousands(int64_t value) {
  const std::string digits = std::to_string(value);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) {
      text += ',';
    }
    text += digits[i];
  }
  return text;
}

std::string padded(const std::string& text, size_t width) {
  return std::string(width - std::min(width, text.size()), ' ') + text;
}

std::string percent(double share) {
  return printf_text("%.0f%%", 100 * share);
}

// A part of the step line, with what separates it from the parts before.
struct Field {
  std::string text;
  int turn;  // at which a line that is too wide goes without it
};
constexpr int kStays = 0;
constexpr int kLastTurn = 7;

// The turns are by need: what hardly changes or follows from the rest goes first.
std::vector<Field> step_fields(const StepRecord& record) {
  std::string step = with_thousands(record.step);
  if (record.total_steps) {
    const std::string total = with_thousands(*record.total_steps);
    step = padded(step, total.size()) + "/" + total;
  }
  std::vector<Field> fields = {
      {"step " + step, kStays},
      {" | " + padded(format_count(record.tokens), 5) + " tokens", 1},
      {" | loss " + printf_text("%.4f", record.loss), kStays},
      {" (avg " + printf_text("%.4f", record.smoothed_loss) + ")", kLastTurn},
      {" | lr " + printf_text("%.2e", record.lr), 4},
      {" | grad " + printf_text("%.2f", record.grad_norm), 5},
  };
  if (record.tokens_per_s) {
    fields.push_back(
        {" | " + with_thousands(std::llround(*record.tokens_per_s)) + " tok/s", kStays});
  }
  if (record.mfu) {
    fields.push_back({" | mfu " + percent(*record.mfu), 6});
  }
  if (record.data_wait) {
    fields.push_back({" | data " + percent(*record.data_wait), 3});
  }
  if (record.memory_bytes) {
    fields.push_back({" | " + format_bytes(*record.memory_bytes), 2});
  }
  if (record.seconds_left) {
    fields.push_back({" | " + format_duration(*record.seconds_left) + " left", kStays});
  }
  if (record.validation_loss) {
    fields.push_back({" | val " + printf_text("%.4f", *record.validation_loss), kStays});
  }
  return fields;
}

// The step of a line, or nothing if it is no object with one.
std::optional<int64_t> step_of(std::string_view line) {
  const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) {
    return std::nullopt;
  }
  return json["step"].get<int64_t>();
}

// The lines of `text` up to `last_step`, each with its end.
std::string lines_up_to(const std::string& path, std::string_view text, int64_t last_step) {
  std::string kept;
  int64_t line_number = 0;
  while (!text.empty()) {
    ++line_number;
    const size_t end = text.find('\n');
    if (end == text.npos) {
      break;  // cut while it was written: the step is not known to be complete
    }
    const std::string_view line = text.substr(0, end);
    const auto step = step_of(line);
    if (!step) {
      throw std::runtime_error(path + ":" + std::to_string(line_number) + ": \"" +
                               std::string(line.substr(0, 40)) +
                               "\" is not a JSON object with a \"step\"; "
                               "repair the line, or move the file away");
    }
    if (*step <= last_step) {
      kept.append(text.substr(0, end + 1));
    }
    text.remove_prefix(end + 1);
  }
  return kept;
}

// The last of lines that each have their end, without it.
std::string last_line(std::string_view lines) {
  if (lines.empty()) {
    return "";
  }
  lines.remove_suffix(1);
  return std::string(lines.substr(lines.rfind('\n') + 1));
}

}  // namespace

std::string format_duration(double seconds) {
  // Beyond that nobody plans, and the conversion to an integer would not be defined.
  constexpr double kMostSeconds = 1e9;
  const auto s = std::llround(std::min(seconds, kMostSeconds));
  if (s < 60) {
    return printf_text("%llds", s);
  }
  if (s < 3600) {
    return printf_text("%lldm%02llds", s / 60, s % 60);
  }
  if (s < 86400) {
    return printf_text("%lldh%02lldm", s / 3600, s / 60 % 60);
  }
  return printf_text("%lldd%02lldh", s / 86400, s / 3600 % 24);
}

std::string format_count(int64_t count) {
  if (count < 1000) {
    return std::to_string(count);
  }
  double value = static_cast<double>(count);
  std::string_view units = "kMGT";
  value /= 1000;
  // 999.5 would be printed as 1000.
  while (value >= 999.5 && units.size() > 1) {
    value /= 1000;
    units.remove_prefix(1);
  }
  const int decimals = value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return printf_text("%.*f%c", decimals, value, units.front());
}

std::string format_bytes(int64_t bytes) {
  const std::string count = format_count(bytes);
  const bool has_unit = count.find_last_of("kMGT") != count.npos;
  return has_unit ? count.substr(0, count.size() - 1) + " " + count.back() + "B" : count + " B";
}

std::string format_step_line(const StepRecord& record, size_t width) {
  const std::vector<Field> fields = step_fields(record);
  std::string line;
  for (int dropped = 0; dropped <= kLastTurn; ++dropped) {
    line.clear();
    for (const Field& field : fields) {
      line += field.turn == kStays || field.turn > dropped ? field.text : "";
    }
    if (line.size() <= width) {
      break;
    }
  }
  return line;
}

ProgressMeter::ProgressMeter(int64_t tokens, double now_s, std::optional<SmoothedLoss> before)
    : marks_{{now_s, tokens, 0}} {
  if (before) {
    // The sum of as many weights as there were steps.
    const double falling = std::pow(kLossDecay, static_cast<double>(before->step));
    weight_ = (1 - falling) / (1 - kLossDecay);
    weighted_loss_ = weight_ * before->value;
  }
}

StepRecord ProgressMeter::finish_step(StepRecord record, double now_s, double waited_s) {
  // Divided by the sum of weights, so that the first steps are a mean and not pulled towards 0.
  weighted_loss_ = kLossDecay * weighted_loss_ + record.loss;
  weight_ = kLossDecay * weight_ + 1;
  record.smoothed_loss = weighted_loss_ / weight_;
  ++num_steps_;
  marks_.push_back({now_s - excluded_s_, record.tokens, waited_s});
  if (marks_.size() > kSpeedWindow + 1) {
    marks_.pop_front();
  }
  const double elapsed_s = marks_.back().time_s - marks_.front().time_s;
  if (elapsed_s > 0) {
    const double step_s = elapsed_s / static_cast<double>(marks_.size() - 1);
    record.tokens_per_s = static_cast<double>(record.tokens - marks_.front().tokens) / elapsed_s;
    record.data_wait = (waited_s - marks_.front().waited_s) / elapsed_s;
    if (record.total_steps) {
      const auto steps_left = static_cast<double>(*record.total_steps - record.step);
      // Pauses may lie far apart, so that all of the run tells what one step has of them.
      record.seconds_left = steps_left * (step_s + excluded_s_ / num_steps_);
    }
  }
  return record;
}

StepFile::StepFile(const std::string& path, int64_t resumed_step) : path_(path) {
  if (std::filesystem::exists(path)) {
    const std::string text = read_text_file(path);
    const std::string kept = lines_up_to(path, text, resumed_step);
    if (kept != text) {
      AtomicFile file(path);
      file.write(kept);
      file.commit();
    }
    last_kept_line_ = last_line(kept);
  }
  file_.open(path, std::ios::binary | std::ios::app);
  if (!file_) {
    throw std::runtime_error(path +
                             ": cannot be opened for appending; is its folder there, and "
                             "writable?");
  }
}

void StepFile::append(int64_t step, const std::string& json) {
  file_ << json + "\n" << std::flush;
  if (!file_) {
    throw std::runtime_error(path_ + ": writing the line of step " + std::to_string(step) +
                             " failed; is the disk full?");
  }
}

std::string to_json(const StepRecord& record) {
  nlohmann::ordered_json line = {{"step", record.step}};
  const auto add = [&](const char* name, const auto& value) {
    if (value) {
      line[name] = *value;
    }
  };
  add("total_steps", record.total_steps);
  line["tokens"] = record.tokens;
  line["loss"] = record.loss;
  line["smoothed_loss"] = record.smoothed_loss;
  line["lr"] = record.lr;
  line["grad_norm"] = record.grad_norm;
  add("tokens_per_s", record.tokens_per_s);
  add("data_wait", record.data_wait);
  add("mfu", record.mfu);
  add("memory_bytes", record.memory_bytes);
  add("seconds_left", record.seconds_left);
  add("validation_loss", record.validation_loss);
  if (record.telemetry) {
    nlohmann::ordered_json& telemetry = line["telemetry"];
    telemetry["largest_logit"] = record.telemetry->largest_logit;
    for (const auto& [name, values] : record.telemetry->by_layer) {
      telemetry[name] = values;
    }
  }
  line["elapsed_s"] = record.elapsed_s;
  line["time"] = record.time;
  return line.dump();
}

}  // namespace rwkv
