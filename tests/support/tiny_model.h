// Comparing a model with what is known of rwkv.cpp's tiny models.
#pragma once

#include <string>

#include "model/rwkv_model.h"

namespace rwkv::test {

// The 256 logits that rwkv.cpp stores after three bytes, then, of 64 bytes, the logits after each
// and the state after all, in rwkv.cpp's buffer. `name` as in the files: "5v2-730K".
void expect_tiny_model(RwkvModel model, const std::string& name, int64_t likeliest);

}  // namespace rwkv::test
