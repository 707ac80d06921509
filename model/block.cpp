#include "model/block.h"

#include <functional>

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// The mixes of a norm again, from the sum that it normalised.
std::function<std::vector<at::Tensor>()> mixes_again(const LayerNorm& norm,
                                                     const at::Tensor& sum_BTC,
                                                     const at::Tensor& carry_BC,
                                                     const at::Tensor& mix_JC) {
  return
      [norm, sum_BTC = sum_BTC.detach(), carry_BC = carry_BC.detach(), mix_JC = mix_JC.detach()] {
        return norm->shift_mix(sum_BTC, {}, carry_BC, mix_JC).mixed_J;
      };
}

}  // namespace

BlockImpl::BlockImpl(int64_t layer,
                     int64_t n_embd,
                     std::shared_ptr<TimeMix> time_mix,
                     std::shared_ptr<ChannelMix> channel_mix)
    : ln1(n_embd), ln2(n_embd), att(std::move(time_mix)), ffn(std::move(channel_mix)) {
  register_module("ln1", ln1);
  register_module("ln2", ln2);
  if (layer == 0) {
    ln0 = register_module("ln0", LayerNorm(n_embd));
  }
  register_module("att", att);
  register_module("ffn", ffn);
}

BlockOutput BlockImpl::run(const at::Tensor& x_BTC, const LayerState& before, bool drop_mixes) {
  const at::Tensor att_mixes = att->mixes();
  const auto att_in = ln1->shift_mix(ln0 ? ln0(x_BTC) : x_BTC, {}, before.att_shift_BC, att_mixes);
  const TimeMixOutput mixed = att->forward({.mixed_J = att_in.mixed_J, .wkv = before.wkv});
  if (drop_mixes) {
    drop_until_backward(att_in.mixed_J,
                        {mixed.y_BTC, mixed.wkv},
                        mixes_again(ln1, att_in.sum_BTC, before.att_shift_BC, att_mixes));
  }
  const at::Tensor ffn_mixes = ffn->mixes();
  const auto ffn_in = ln2->shift_mix(att_in.sum_BTC, mixed.y_BTC, before.ffn_shift_BC, ffn_mixes);
  const at::Tensor out_BTC = ffn->forward(ffn_in.sum_BTC, ffn_in.mixed_J);
  if (drop_mixes) {
    drop_until_backward(ffn_in.mixed_J,
                        {out_BTC},
                        mixes_again(ln2, ffn_in.sum_BTC, before.ffn_shift_BC, ffn_mixes));
  }
  return {
      .x_BTC = out_BTC,
      .after = {.att_shift_BC = att_in.last_BC, .ffn_shift_BC = ffn_in.last_BC, .wkv = mixed.wkv}};
}

BlockOutput BlockImpl::forward(const at::Tensor& x_BTC,
                               const LayerState& before,
                               Recompute recompute) {
  if (recompute != Recompute::kBlocks) {
    return run(x_BTC, before, recompute == Recompute::kMixes);
  }
  const auto outputs = run_twice(
      [this](const std::vector<at::Tensor>& in) {
        const BlockOutput output =
            run(in[0], {.att_shift_BC = in[1], .ffn_shift_BC = in[2], .wkv = in[3]}, false);
        return std::vector{
            output.x_BTC, output.after.att_shift_BC, output.after.ffn_shift_BC, output.after.wkv};
      },
      {x_BTC, before.att_shift_BC, before.ffn_shift_BC, before.wkv});
  return {.x_BTC = outputs[0],
          .after = {.att_shift_BC = outputs[1], .ffn_shift_BC = outputs[2], .wkv = outputs[3]}};
}

}  // namespace rwkv
