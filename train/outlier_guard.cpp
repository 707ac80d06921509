#include "train/outlier_guard.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace rwkv {
namespace {

// Where all steps are alike to rounding, rounding is no outlier.
constexpr double kLeastDeviation = 1e-6;

struct Spread {
  double mean;
  double deviation;
};

Spread spread_of(const std::vector<double>& values) {
  const auto count = static_cast<double>(values.size());
  double sum = 0;
  for (const double value : values) {
    sum += value;
  }
  const double mean = sum / count;
  double squares = 0;
  for (const double value : values) {
    squares += (value - mean) * (value - mean);
  }
  return {.mean = mean, .deviation = std::max(std::sqrt(squares / count), kLeastDeviation)};
}

}  // namespace

OutlierLimits OutlierGuard::limits(int64_t step, double z) const {
  std::vector<double> losses, log_norms;
  for (auto it = applied_.rbegin(); it != applied_.rend() && losses.size() < kWindow; ++it) {
    if (it->step <= step - 2) {
      losses.push_back(it->loss);
      // A norm of 0 has no logarithm.
      log_norms.push_back(
          std::log(std::max(it->gradient_norm, std::numeric_limits<double>::min())));
    }
  }
  if (losses.size() < kLeastSteps) {
    return {};
  }
  const Spread loss = spread_of(losses);
  const Spread log_norm = spread_of(log_norms);
  return {.loss = loss.mean + z * loss.deviation,
          .gradient_norm = std::exp(log_norm.mean + z * log_norm.deviation),
          .loss_mean = loss.mean,
          .loss_deviation = loss.deviation,
          .log_norm_mean = log_norm.mean,
          .log_norm_deviation = log_norm.deviation};
}

void OutlierGuard::add_applied(int64_t step, double loss, double gradient_norm) {
  applied_.push_back({.step = step, .loss = loss, .gradient_norm = gradient_norm});
  if (applied_.size() > kWindow + 1) {
    applied_.pop_front();
  }
  num_in_a_row_ = 0;
}

void OutlierGuard::add_skipped() {
  ++num_skipped_;
  ++num_in_a_row_;
}

void OutlierGuard::forget() {
  applied_.clear();
  num_in_a_row_ = 0;
}

nlohmann::ordered_json OutlierGuard::to_json() const {
  nlohmann::ordered_json applied = nlohmann::ordered_json::array();
  for (const AppliedStep& at : applied_) {
    applied.push_back({at.step, at.loss, at.gradient_norm});
  }
  return {{"skipped", num_skipped_}, {"in_a_row", num_in_a_row_}, {"applied", std::move(applied)}};
}

OutlierGuard OutlierGuard::from_json(const nlohmann::json& json) {
  OutlierGuard guard;
  guard.num_skipped_ = json.at("skipped");
  guard.num_in_a_row_ = json.at("in_a_row");
  for (const nlohmann::json& at : json.at("applied")) {
    guard.applied_.push_back({.step = at.at(0), .loss = at.at(1), .gradient_norm = at.at(2)});
  }
  return guard;
}

std::string to_json(const SkippedStep& skipped, double time) {
  const nlohmann::ordered_json json = {
      {"step", skipped.step},
      {"first_sample", skipped.first_sample},
      {"last_sample", skipped.last_sample},
      {"loss", skipped.loss},
      {"grad_norm", skipped.gradient_norm},
      {"loss_limit", skipped.limits.loss},
      {"grad_norm_limit", skipped.limits.gradient_norm},
      {"loss_mean", skipped.limits.loss_mean},
      {"loss_deviation", skipped.limits.loss_deviation},
      {"log_grad_norm_mean", skipped.limits.log_norm_mean},
      {"log_grad_norm_deviation", skipped.limits.log_norm_deviation},
      {"time", time}};
  return json.dump();
}

std::string describe(const SkippedStep& skipped) {
  return fmt::format(
      "step {}, of samples {} to {}: loss {:.4f} and gradient norm {:.4g}, where {:.4f} "
      "and {:.4g} are the limits",
      skipped.step,
      skipped.first_sample,
      skipped.last_sample,
      skipped.loss,
      skipped.gradient_norm,
      skipped.limits.loss,
      skipped.limits.gradient_norm);
}

}  // namespace rwkv
