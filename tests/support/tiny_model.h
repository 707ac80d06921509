// Small models: random ones, and comparing one with what is known of rwkv.cpp's tiny models.
#pragma once

#include <map>
#include <string>

#include "model/rwkv_model.h"

namespace rwkv::test {

// Every weight random: at initial ones of RWKV-7 the logits do not depend on the state. Heads of
// eight channels where the version has heads; 48 tokens.
RwkvModel random_model(const std::string& version, int64_t n_layer = 2, int64_t n_embd = 16);

// A model with these weights; what the file's tensors do not say is `config`'s.
RwkvModel model_of(const std::map<std::string, at::Tensor>& tensors, const ModelConfig& config);

// The 256 logits that rwkv.cpp stores after three bytes, then, of 64 bytes, the logits after each
// and the state after all, in rwkv.cpp's buffer. `name` as in the files: "5v2-730K".
void expect_tiny_model(RwkvModel model, const std::string& name, int64_t likeliest);

}  // namespace rwkv::test
