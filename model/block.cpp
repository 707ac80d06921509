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

BlockOutput BlockImpl::run(const BlockInput& input, const LayerState& before, bool drop_mixes) {
  const at::Tensor att_mixes = att->mixes();
  const at::Tensor x_BTC = ln0 ? ln0(input.x_BTC) : input.x_BTC;
  const auto att_in = ln1->shift_mix(x_BTC, {}, before.att_shift_BC, att_mixes);
  const TimeMixOutput mixed = att->forward(
      {.mixed_J = att_in.mixed_J, .wkv = before.wkv, .v_first_BTC = input.v_first_BTC});
  if (drop_mixes) {
    std::vector<at::Tensor> outputs{mixed.y_BTC, mixed.wkv};
    if (mixed.v_first_BTC.defined()) {
      outputs.push_back(mixed.v_first_BTC);
    }
    drop_until_backward(
        att_in.mixed_J, outputs, mixes_again(ln1, att_in.sum_BTC, before.att_shift_BC, att_mixes));
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
      .next = {.x_BTC = out_BTC,
               .v_first_BTC = mixed.v_first_BTC.defined() ? mixed.v_first_BTC : input.v_first_BTC},
      .after = {.att_shift_BC = att_in.last_BC, .ffn_shift_BC = ffn_in.last_BC, .wkv = mixed.wkv}};
}

TimeMixTelemetry BlockImpl::telemetry(const BlockInput& input, const LayerState& before) {
  const at::Tensor x_BTC = ln0 ? ln0(input.x_BTC) : input.x_BTC;
  return att->telemetry(ln1->shift_mix(x_BTC, {}, before.att_shift_BC, att->mixes()).mixed_J);
}

BlockOutput BlockImpl::forward(const BlockInput& input,
                               const LayerState& before,
                               Recompute recompute) {
  if (recompute != Recompute::kBlocks) {
    return run(input, before, recompute == Recompute::kMixes);
  }
  const bool has_v_first = input.v_first_BTC.defined();
  const auto outputs = run_twice(
      [this, has_v_first](const std::vector<at::Tensor>& in) {
        const BlockOutput output =
            run({.x_BTC = in[0], .v_first_BTC = has_v_first ? in[4] : at::Tensor()},
                {.att_shift_BC = in[1], .ffn_shift_BC = in[2], .wkv = in[3]},
                false);
        std::vector results{output.next.x_BTC,
                            output.after.att_shift_BC,
                            output.after.ffn_shift_BC,
                            output.after.wkv};
        if (!has_v_first && output.next.v_first_BTC.defined()) {
          results.push_back(output.next.v_first_BTC);
        }
        return results;
      },
      {input.x_BTC, before.att_shift_BC, before.ffn_shift_BC, before.wkv, input.v_first_BTC});
  return {.next = {.x_BTC = outputs[0],
                   .v_first_BTC = outputs.size() > 4 ? outputs[4] : input.v_first_BTC},
          .after = {.att_shift_BC = outputs[1], .ffn_shift_BC = outputs[2], .wkv = outputs[3]}};
}

}  // namespace rwkv
