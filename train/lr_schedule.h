// The learning rate as a pure function of tokens seen: a resumed run needs no state of it, and a
// change of batch size leaves the curve where it was.
// Source: BlinkDL/RWKV-LM RWKV-v4neo/src/trainer.py (exponential, linear, cosine, warm-up), with
// its steps counted in tokens; warmup_stable_decay: MiniCPM, arXiv:2404.06395, section 4.
#pragma once

#include <cstdint>

namespace rwkv {

enum class ScheduleKind { kExponential, kLinear, kCosine, kConstant, kWarmupStableDecay };

struct LrSchedule {
  ScheduleKind kind = ScheduleKind::kExponential;
  double lr_init = 6e-4;      // after warm-up; 0 or more
  double lr_final = 1e-5;     // at the last token; 0 or more; kConstant does not use it
  int64_t warmup_tokens = 0;  // 0 or more; 0 starts at the full rate
  int64_t decay_tokens = 0;   // kWarmupStableDecay: tokens of the last decay, 1 or more; else 0
  // Fraction of the rate at the first token of a warm-up, 0 to 1. RWKV-LM: v4 0.2, v7 0.01.
  double warmup_start = 0.2;

  // The rate for a step before which `tokens_seen` >= 0 tokens were trained on, in a run of
  // `total_tokens`. With w = warmup_tokens, p = clamp((tokens_seen - w) / (total_tokens - w), 0,
  // 1):
  //   kExponential        lr_init * (lr_final / lr_init)^p; as kLinear if either of them is 0
  //   kLinear             lr_init + (lr_final - lr_init) * p
  //   kCosine             lr_init * ((1/2 + f/2) + (1/2 - f/2) cos(pi p)), f = lr_final / lr_init
  //   kConstant           lr_init
  //   kWarmupStableDecay  lr_init until total_tokens - decay_tokens, then in a straight line to
  //                       lr_final at total_tokens
  // times warmup_start + (1 - warmup_start) * tokens_seen / w while tokens_seen < w. Past
  // total_tokens the rate stays what it is there.
  double lr(int64_t tokens_seen, int64_t total_tokens) const;

  // Throws std::invalid_argument naming the key ("schedule.lr_init = -1.0: ...") for a value out of
  // range, or for decay_tokens with a kind that has no use for them.
  void validate() const;
  // Throws std::invalid_argument if warm-up and last decay do not fit into total_tokens.
  void validate_for(int64_t total_tokens) const;
  bool operator==(const LrSchedule&) const = default;
};

}  // namespace rwkv
