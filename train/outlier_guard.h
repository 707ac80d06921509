// Which steps are outliers: those whose loss or gradient norm lies far above what the steps before
// them had (train.skip_outliers_z). No Torch.
//
// A step is compared with the last kWindow steps that were applied: with mean and standard
// deviation of their losses and of the logarithms of their gradient norms, whose spread is that of
// a factor. Of these steps the one just before is never one: a device is still at it when the next
// is launched (train/trainer.cpp), and is to decide as a CPU does.
//
// The decision itself falls where the numbers are (model/ops/adamw.h), against the limits from
// here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace rwkv {

// What may not be exceeded, and what that comes from.
struct OutlierLimits {
  double loss = std::numeric_limits<double>::infinity();
  double gradient_norm = std::numeric_limits<double>::infinity();
  double loss_mean = 0;
  double loss_deviation = 0;
  double log_norm_mean = 0;  // of the natural logarithm
  double log_norm_deviation = 0;
};

// A step that was not applied: a line of skipped.jsonl.
struct SkippedStep {
  int64_t step = 0;
  int64_t first_sample = 0;
  int64_t last_sample = 0;
  double loss = 0;
  double gradient_norm = 0;  // before clipping
  OutlierLimits limits;
};
// An object in one line: the names of SkippedStep and OutlierLimits, and `time`, seconds since
// 1970.
std::string to_json(const SkippedStep& skipped, double time);
// For the log: what was found, and what was expected.
std::string describe(const SkippedStep& skipped);

// Is kept in checkpoints: a run that goes on decides as one that was never interrupted.
class OutlierGuard {
 public:
  static constexpr size_t kWindow = 128;
  // With fewer steps there are no limits.
  static constexpr size_t kLeastSteps = 32;
  // Then it is not the step: the loss has changed for good.
  static constexpr int64_t kMostInARow = 10;

  // Of `step`, `z` standard deviations above the mean; infinite until there are kLeastSteps.
  OutlierLimits limits(int64_t step, double z) const;

  // What `step` came to; steps are handed in in order, each once.
  void add_applied(int64_t step, double loss, double gradient_norm);
  void add_skipped();
  // What is remembered is too old to compare with: nobody looked at the steps since.
  void forget();

  bool is_empty() const { return applied_.empty() && num_skipped_ == 0; }
  int64_t num_skipped() const { return num_skipped_; }  // so far
  int64_t num_in_a_row() const { return num_in_a_row_; }

  // Numbers come back exactly. from_json throws nlohmann::json::exception for what is no guard.
  nlohmann::ordered_json to_json() const;
  static OutlierGuard from_json(const nlohmann::json& json);

 private:
  struct AppliedStep {
    int64_t step;
    double loss;
    double gradient_norm;
  };
  // One more than the window, for the one just before.
  std::deque<AppliedStep> applied_;
  int64_t num_skipped_ = 0;
  int64_t num_in_a_row_ = 0;
};

}  // namespace rwkv
