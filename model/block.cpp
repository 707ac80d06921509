#include "model/block.h"

#include <ATen/ATen.h>

namespace rwkv {
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

BlockOutput BlockImpl::forward(const at::Tensor& x_BTC, const LayerState& before) {
  const auto att_in =
      ln1->shift_mix(ln0 ? ln0(x_BTC) : x_BTC, {}, before.att_shift_BC, att->mixes());
  const TimeMixOutput mixed = att->forward({.mixed_J = att_in.mixed_J, .wkv = before.wkv});
  const auto ffn_in =
      ln2->shift_mix(att_in.sum_BTC, mixed.y_BTC, before.ffn_shift_BC, ffn->mixes());
  return {
      .x_BTC = ffn->forward(ffn_in.sum_BTC, ffn_in.mixed_J),
      .after = {.att_shift_BC = att_in.last_BC, .ffn_shift_BC = ffn_in.last_BC, .wkv = mixed.wkv}};
}

}  // namespace rwkv
