// What a run says while it runs: the log and the line on the terminal, metrics.jsonl,
// samples.jsonl, skipped.jsonl, starts.jsonl and TensorBoard's event files in the run's folder.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "train/event_file.h"
#include "train/metrics.h"
#include "train/outlier_guard.h"
#include "train/run_config.h"
#include "train/terminal_line.h"

namespace rwkv {

class RunLog {
 public:
  // Opens the files for a run that goes on after `resumed_step` at `time`, seconds since 1970.
  // Throws std::runtime_error naming the file that cannot be read or written.
  RunLog(const RunConfig& config, int64_t resumed_step, double time);

  // Where the smoothed loss had come to in the last row of metrics.jsonl that the run goes on from;
  // nothing if there is none.
  std::optional<SmoothedLoss> smoothed_loss() const;
  // A line for this start of the run: `json` is an object in one line, with a "step".
  void add_start(const std::string& json);
  // A step that was only done, and one to be remembered. Throws std::runtime_error if a file cannot
  // be written.
  void show(const StepRecord& record);
  void add(const StepRecord& record);
  // Remembers the last step if it was only shown, so that a run that ends between two logged steps
  // leaves where it came to. Nothing otherwise. Throws as add does.
  void add_shown();
  void add_sample(const StepRecord& record, const std::string& prompt, const std::string& text);
  // A step that was not applied, at `time`, seconds since 1970.
  void add_skipped(const SkippedStep& skipped, double time);
  // A line of the log.
  void say(const std::string& text);

 private:
  void add_events(const Telemetry& telemetry, int64_t step, double time);

  StepFile metrics_;
  std::optional<StepFile> samples_;  // if asked for
  std::optional<StepFile> skipped_;  // if outliers are skipped
  StepFile starts_;
  std::optional<EventWriter> events_;
  TerminalLine line_;
  std::optional<StepRecord> shown_;  // the last step, if it was not remembered
};

}  // namespace rwkv
