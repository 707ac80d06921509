// The shape of a model. No Torch here: configuration files and file readers use it too.
#pragma once

#include <cstdint>
#include <string>

namespace rwkv {

struct ModelConfig {
  std::string version = "rwkv4";  // a name of the version registry
  int64_t n_layer = 6;            // 1 or more
  int64_t n_embd = 384;           // C, 1 or more
  int64_t dim_att = 0;            // A; 0 until resolve() makes it n_embd
  int64_t dim_ffn = 0;            // F; 0 until resolve() makes it what the version's author uses
  int64_t head_size = 0;          // N; versions without heads (rwkv4) keep it 0
  // Inner sizes of the low-rank factors of RWKV-6 (mix, decay) and RWKV-7 (all others); 0 until
  // resolve() takes the author's, and in other versions.
  int64_t rank_mix = 0;    // of time_maa_w1 and time_maa_w2, for each of five mixes
  int64_t rank_decay = 0;  // of w1 and w2, time_decay_w1 and time_decay_w2
  int64_t rank_iclr = 0;   // of a1 and a2, the in-context learning rate
  int64_t rank_value = 0;  // of v1 and v2
  int64_t rank_gate = 0;   // of g1 and g2
  // Of versions with heads: added to the variance of a head's output before it is normalised. All
  // released models have this one and no file tells it, so it is no key of a configuration. Only
  // rwkv.cpp's tiny RWKV-5 models, which tests compute, want another: 1e-5.
  double group_norm_eps = 64e-5;
  int64_t vocab_size = 0;  // V, 1 or more; 0 until it is taken from the tokenizer
  int64_t ctx_len = 256;   // T trained for; the model itself takes any T

  // Throws std::invalid_argument naming the key ("model.n_embd = -3: ...") for a value out of
  // range.
  void validate() const;
  bool operator==(const ModelConfig&) const = default;
};

}  // namespace rwkv
