#include "model/block.h"

#include <ATen/ATen.h>

namespace rwkv {
namespace {

// The row that the next token's shift needs.
at::Tensor last_row(const at::Tensor& x_BTC) {
  return x_BTC.select(1, x_BTC.size(1) - 1);
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

BlockOutput BlockImpl::forward(const at::Tensor& x_BTC, const LayerState& before) {
  const at::Tensor residual_BTC = ln0 ? ln0(x_BTC) : x_BTC;

  const at::Tensor att_in_BTC = ln1(residual_BTC);
  const TimeMixOutput mixed = att->forward({.x_BTC = att_in_BTC, .before = before});
  const at::Tensor middle_BTC = residual_BTC + mixed.y_BTC;

  const at::Tensor ffn_in_BTC = ln2(middle_BTC);
  const at::Tensor previous_BTC = token_shift(ffn_in_BTC, before.ffn_shift_BC);
  return {.x_BTC = middle_BTC + ffn->forward(ffn_in_BTC, previous_BTC),
          .after = {.att_shift_BC = last_row(att_in_BTC),
                    .ffn_shift_BC = last_row(ffn_in_BTC),
                    .wkv = mixed.wkv}};
}

}  // namespace rwkv
