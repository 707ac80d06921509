#include <algorithm>
#include <charconv>
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <system_error>

#include <ATen/ATen.h>

#include "model/formats/safetensors.h"
#include "model/weights.h"
#include "train/checkpoint.h"
#include "train/commands/commands.h"
#include "train/commands/model_options.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery logits --model rwkv.pth --tokens 510,3158,8516 --mode recurrent";

std::vector<int64_t> parse_tokens(const std::string& text) {
  std::vector<int64_t> tokens;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    int64_t token = 0;
    const auto parsed = std::from_chars(text.data() + begin, text.data() + end, token);
    if (parsed.ec != std::errc() || parsed.ptr != text.data() + end) {
      throw std::invalid_argument("--tokens: \"" + text.substr(begin, end - begin) +
                                  "\" is no token id; expected ids separated by commas, such as " +
                                  "510,3158,8516");
    }
    tokens.push_back(token);
    begin = end + 1;
  }
  return tokens;
}

void check_tokens(const std::vector<int64_t>& tokens, int64_t vocab_size) {
  for (const int64_t token : tokens) {
    if (token < 0 || token >= vocab_size) {
      throw std::invalid_argument("--tokens: " + std::to_string(token) +
                                  " is not in the model's vocabulary of " +
                                  std::to_string(vocab_size));
    }
  }
}

// [T, V], from one pass over the sequence or from T passes over a token each.
at::Tensor all_logits(RwkvModel model, const at::Tensor& tokens_1T, bool recurrent) {
  State state = model->initial_state(1);
  if (!recurrent) {
    return model->forward(tokens_1T, state).logits_BTV[0];
  }
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < tokens_1T.size(1); ++t) {
    auto output = model->forward_last(tokens_1T.slice(1, t, t + 1), state);
    rows.push_back(output.logits_BV[0]);
    state = std::move(output.state);
  }
  return at::stack(rows);
}

}  // namespace

int logits_command(int argc, char** argv) {
  cxxopts::Options options("rookery logits",
                           "Prints the logits after the last token, one a line; with --all writes "
                           "those of every position.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("model",
      "a run, a checkpoint folder, a .pth or .safetensors file",
      cxxopts::value<std::string>());
  add("tokens", "token ids, separated by commas", cxxopts::value<std::string>());
  add("mode",
      "parallel (GPT mode) or recurrent (RNN mode)",
      cxxopts::value<std::string>()->default_value("parallel"));
  add("all", "every position's, as \"logits\" [T, V] in --output");
  add("output", "a .safetensors file, with --all", cxxopts::value<std::string>());
  add_model_options(add);
  const auto parsed = parse_options(options, argc, argv, kExample, {"model", "tokens"});
  if (!parsed) {
    return 0;
  }
  const std::string mode = (*parsed)["mode"].as<std::string>();
  if (mode != "parallel" && mode != "recurrent") {
    throw std::invalid_argument("--mode " + mode + ": expected parallel or recurrent");
  }
  const bool all = parsed->count("all") > 0;
  if (all != (parsed->count("output") > 0)) {
    throw std::invalid_argument(
        "--all and --output go together; for example: --all --output a.safetensors");
  }
  const auto tokens = parse_tokens((*parsed)["tokens"].as<std::string>());
  const at::NoGradGuard no_grad;
  RwkvModel model = open_model_with(
      *parsed, find_model((*parsed)["model"].as<std::string>(), Scrutiny::kWeights));
  check_tokens(tokens, model->config().vocab_size);
  const at::Tensor logits_TV =
      all_logits(model, at::tensor(tokens).to(model->device()).unsqueeze(0), mode == "recurrent")
          .to(at::kCPU, at::kFloat)
          .contiguous();
  if (all) {
    const NamedTensors tensors{{"logits", logits_TV}};
    write_safetensors((*parsed)["output"].as<std::string>(), to_write(tensors), {});
    return 0;
  }
  const at::Tensor last_V = logits_TV[logits_TV.size(0) - 1];
  for (int64_t i = 0; i < last_V.size(0); ++i) {
    std::printf("%.9g\n", static_cast<double>(last_V[i].item<float>()));
  }
  return 0;
}

}  // namespace rwkv
