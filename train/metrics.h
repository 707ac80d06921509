// How a run is going: the line a user watches, and files of a line for each step. Time is an
// argument everywhere: nothing here reads a clock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace rwkv {

// How layers and heads fare (model/telemetry.h), before a step's update.
struct Telemetry {
  double largest_logit = 0;
  std::map<std::string, std::vector<std::vector<double>>> by_layer = {};  // [layer][head]
};

// What is known after a step.
struct StepRecord {
  int64_t step = 0;                         // done so far, from 1
  std::optional<int64_t> total_steps = {};  // of the whole run, if it ends in steps
  int64_t tokens = 0;                       // trained on so far, those before a resume included
  double loss = 0;                          // of this step's batch, in nats a token
  double smoothed_loss = 0;
  double lr = 0;         // that this step used
  double grad_norm = 0;  // before clipping
  // Over the last steps; nothing before two points in time are known.
  std::optional<double> tokens_per_s = {};
  std::optional<double> seconds_left = {};
  std::optional<double> data_wait = {};  // share of that time spent waiting for data, 0 to 1
  // Floating-point operations of the model's matrix products over what this machine's matrix
  // products reach, 0 to 1.
  std::optional<double> mfu = {};
  std::optional<int64_t> memory_bytes = {};    // most that the program has held so far
  std::optional<double> validation_loss = {};  // if the step ended with a validation
  std::optional<Telemetry> telemetry = {};     // if it was asked for at this step
  double elapsed_s = 0;                        // of training so far, those before a resume included
  double time = 0;                             // wall clock, seconds since 1970
};

// One line without its end, in columns that stay put from step to step:
//   step   120/4,000 | 3.07M tokens | loss 2.3456 (avg 2.4012) | lr 5.98e-04 | grad 0.81 |
//   45,123 tok/s | mfu 62% | data 0% | 1.21 GB | 1h02m left
// (one line); then " | val 2.2910" if there was a validation. Of a line of more than `width`
// columns whole fields are left out, those needed least first: tokens, memory, data, lr, grad, mfu,
// avg. The others stay, even if they do not fit.
std::string format_step_line(const StepRecord& record, size_t width = std::string::npos);
// "45s", "12m05s", "3h07m", "2d04h": two units, so that it is read at a glance. Rounded to seconds;
// 0 or more.
std::string format_duration(double seconds);
// "999", "3.07M": three digits and a unit of k, M, G, T. 0 or more.
std::string format_count(int64_t count);
// "999 B", "1.21 GB": the same, of bytes.
std::string format_bytes(int64_t bytes);

// A mean of the losses up to a step, from the first one on, with exponentially falling weights.
struct SmoothedLoss {
  int64_t step = 0;
  double value = 0;
};

// Keeps what a line needs from the steps before it: the smoothed loss, and the times of the last
// steps. A resumed run starts the times anew.
class ProgressMeter {
 public:
  // `now_s` is the time in seconds, from any fixed point, at which the first step begins;
  // `tokens` those trained on before it, `before` where the smoothed loss goes on from: a resumed
  // run that began it anew would show a jump that the loss did not make.
  ProgressMeter(int64_t tokens, double now_s, std::optional<SmoothedLoss> before = {});

  // Call after every step, logged or not, with the step's own values in `record`; fills in what
  // follows from the steps before it. `now_s` is not below that of the call before, nor is
  // `waited_s`, the time so far spent waiting for data.
  StepRecord finish_step(StepRecord record, double now_s, double waited_s);
  // Leaves time after a step that was not training (a validation, a save) out of the speed. The
  // time left counts on as much of it a step as there has been.
  void exclude_seconds(double seconds) { excluded_s_ += seconds; }

 private:
  struct Mark {
    double time_s;
    int64_t tokens;
    double waited_s;
  };

  double num_steps_ = 0;  // so far, those before a resume not included
  double excluded_s_ = 0;
  double weighted_loss_ = 0;
  double weight_ = 0;
  std::deque<Mark> marks_;  // one before each of the last steps, and one after the last
};

// A file of JSON objects, one a line, that each have a "step": what a run writes as it goes.
class StepFile {
 public:
  // Opens `path` for a run that goes on after `resumed_step` (0: from the start), creating it if it
  // is not there. Lines of later steps, left by the run that was interrupted, are dropped, so that
  // each step is there once; so is a last line that was cut. That rewriting is all or nothing.
  // Throws std::runtime_error naming the file, and the line where one is no object with a step.
  StepFile(const std::string& path, int64_t resumed_step);

  // Appends an object in one line of JSON and hands it to the operating system. Throws
  // std::runtime_error with path and step if that fails.
  void append(int64_t step, const std::string& json);
  // The last of the lines that were there already and were kept; empty if there was none.
  const std::string& last_kept_line() const { return last_kept_line_; }

 private:
  std::string path_;
  std::string last_kept_line_;
  std::ofstream file_;
};

// The line of metrics.jsonl: the names of StepRecord. Values that are not given are left out.
// Telemetry is an object of arrays by layer of arrays by head; a number that is none is null.
std::string to_json(const StepRecord& record);

}  // namespace rwkv
