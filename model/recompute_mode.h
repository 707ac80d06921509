// What backward computes again instead of keeping it. No Torch.
#pragma once

#include <string_view>

namespace rwkv {

// What a model does without between forward and backward; gradients are the same bits with each.
enum class Recompute {
  kNone,
  // The inputs of TimeMix's and ChannelMix's matrices, made again from the residual stream by the
  // pass that made them: 5 of RWKV-4's 17 tensors of [B, T, C] a layer, for 3 % of the time.
  kMixes,
  // All but each block's input: one of 17 stays, and forward runs twice.
  kBlocks,
};

// As train.recompute says it.
constexpr std::string_view name_of(Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return "none";
    case Recompute::kMixes:
      return "mixes";
    case Recompute::kBlocks:
      return "blocks";
  }
  return "";
}

}  // namespace rwkv
