#include "train/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>

#include "train/config_value.h"

namespace rwkv {
namespace {

// How much of the way from `begin` to `end` lies behind `position`, 0 to 1. An empty way is behind
// as soon as it is reached.
double fraction_done(int64_t begin, int64_t end, int64_t position) {
  if (position < begin) {
    return 0;
  }
  if (position >= end) {
    return 1;
  }
  return static_cast<double>(position - begin) / static_cast<double>(end - begin);
}

double rate_without_warmup(const LrSchedule& s, int64_t tokens_seen, int64_t total_tokens) {
  const double progress = fraction_done(s.warmup_tokens, total_tokens, tokens_seen);
  switch (s.kind) {
    case ScheduleKind::kExponential:
      if (s.lr_init > 0 && s.lr_final > 0) {
        return s.lr_init * std::pow(s.lr_final / s.lr_init, progress);
      }
      return std::lerp(s.lr_init, s.lr_final, progress);
    case ScheduleKind::kLinear:
      return std::lerp(s.lr_init, s.lr_final, progress);
    case ScheduleKind::kCosine:
      // The header's formula multiplied out, so that lr_init = 0 needs no division.
      return (s.lr_init + s.lr_final) / 2 +
             (s.lr_init - s.lr_final) / 2 * std::cos(std::numbers::pi * progress);
    case ScheduleKind::kConstant:
      return s.lr_init;
    case ScheduleKind::kWarmupStableDecay:
      return std::lerp(s.lr_init,
                       s.lr_final,
                       fraction_done(total_tokens - s.decay_tokens, total_tokens, tokens_seen));
  }
  return s.lr_init;
}

}  // namespace

double LrSchedule::lr(int64_t tokens_seen, int64_t total_tokens) const {
  const double rate = rate_without_warmup(*this, tokens_seen, total_tokens);
  if (tokens_seen >= warmup_tokens) {
    return rate;
  }
  return rate * std::lerp(warmup_start, 1.0, fraction_done(0, warmup_tokens, tokens_seen));
}

void LrSchedule::validate() const {
  // Weights and the embedding's first values are fp32.
  constexpr double kMost = 1e38;
  require_in_range(0, kMost, "schedule.lr_init", lr_init);
  require_in_range(0, kMost, "schedule.lr_final", lr_final);
  require_at_least(0, "schedule.warmup_tokens", warmup_tokens);
  require_in_range(0, 1, "schedule.warmup_start", warmup_start);
  if (kind == ScheduleKind::kWarmupStableDecay) {
    require_at_least(1, "schedule.decay_tokens", decay_tokens);
  } else if (decay_tokens != 0) {
    reject_value("schedule.decay_tokens",
                 to_config_text(decay_tokens),
                 "only the kind \"warmup_stable_decay\" has a last decay; use that kind, or leave "
                 "the key out");
  }
}

void LrSchedule::validate_for(int64_t total_tokens) const {
  // Compared by subtraction: the sum of two large settings could overflow.
  if (warmup_tokens >= total_tokens) {
    reject_value("schedule.warmup_tokens",
                 to_config_text(warmup_tokens),
                 "the run has " + to_config_text(total_tokens) +
                     " tokens, so warm-up would never end; use fewer");
  }
  if (decay_tokens > total_tokens - warmup_tokens) {
    reject_value("schedule.decay_tokens",
                 to_config_text(decay_tokens),
                 "the run has " + to_config_text(total_tokens) + " tokens, of which " +
                     to_config_text(warmup_tokens) + " are warm-up; use at most " +
                     to_config_text(total_tokens - warmup_tokens));
  }
}

}  // namespace rwkv
