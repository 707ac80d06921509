#include "model/generate.h"

#include <iostream>
#include <limits>
#include <optional>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "model/formats/format_registry.h"
#include "model/weights.h"
#include "train/commands/commands.h"
#include "train/model_tokenizer.h"
#include "train/run_folder.h"

namespace rwkv {
namespace {

constexpr const char* kExample =
    "rookery generate --model runs/mine --prompt \"In the beginning\" --length 100";

// Ids that stand for no text are never drawn; but the one that ends the document may be.
at::Tensor ids_never_drawn(const Tokenizer& tokenizer, int64_t vocab_size) {
  std::vector<int64_t> ids = ids_without_token(tokenizer, vocab_size);
  if (const auto end = tokenizer.end_of_document()) {
    std::erase(ids, *end);
  }
  return at::tensor(ids, at::kLong);
}

}  // namespace

int generate_command(int argc, char** argv) {
  cxxopts::Options options("rookery generate",
                           "Continues a prompt in RNN mode: constant time and memory a token.\n");
  cxxopts::OptionAdder add = options.add_options();
  add("model",
      "a run, a checkpoint folder, a .pth or .safetensors file",
      cxxopts::value<std::string>());
  add("tokenizer", "default: the one the model was trained with", cxxopts::value<std::string>());
  add("prompt",
      "text to continue; none starts a document",
      cxxopts::value<std::string>()->default_value(""));
  add("length", "tokens to generate", cxxopts::value<int64_t>()->default_value("100"));
  add("temperature",
      "0 takes the most likely token",
      cxxopts::value<double>()->default_value("1.0"));
  add("top-p",
      "sample from the likeliest tokens with this probability in all",
      cxxopts::value<double>()->default_value("0.9"));
  add("top-k", "and from this many at most; 0: all", cxxopts::value<int64_t>()->default_value("0"));
  add("seed", "the same seed gives the same text", cxxopts::value<uint64_t>()->default_value("1"));
  add("dtype", "fp32 or bf16", cxxopts::value<std::string>()->default_value("fp32"));
  const auto parsed = parse_options(options, argc, argv, kExample, {"model"});
  if (!parsed) {
    return 0;
  }
  const SamplingOptions sampling{.temperature = (*parsed)["temperature"].as<double>(),
                                 .top_p = (*parsed)["top-p"].as<double>(),
                                 .top_k = (*parsed)["top-k"].as<int64_t>()};
  sampling.validate();
  const int64_t length = (*parsed)["length"].as<int64_t>();
  if (length < 0) {
    throw std::invalid_argument("--length " + std::to_string(length) + ": must be 0 or more");
  }
  const ComputeDtype dtype = parse_dtype((*parsed)["dtype"].as<std::string>());
  const std::string path = find_model((*parsed)["model"].as<std::string>());
  const auto spec = parsed->count("tokenizer") > 0
                        ? std::optional((*parsed)["tokenizer"].as<std::string>())
                        : std::nullopt;
  const auto tokenizer = open_tokenizer_of(read_weights(path), spec);
  const at::NoGradGuard no_grad;
  RwkvModel model = open_model(path, dtype == ComputeDtype::kBf16 ? at::kBFloat16 : at::kFloat);
  require_vocabulary_for(*tokenizer, model->config().vocab_size);

  const std::string prompt = (*parsed)["prompt"].as<std::string>();
  const auto end = tokenizer->end_of_document();
  // A text begins where another ended; what was trained on has that token in front of each
  // document.
  std::vector<int32_t> ids;
  if (end) {
    ids.push_back(*end);
  }
  tokenizer->encode_part(prompt, Tokenizer::TextEnd::kFinal, ids);
  if (ids.empty()) {
    throw std::invalid_argument(
        "--prompt is empty, and this tokenizer has no token that starts a "
        "document; give some text");
  }
  at::Generator generator =
      at::make_generator<at::CPUGeneratorImpl>((*parsed)["seed"].as<uint64_t>());
  const at::Tensor prompt_1T = at::tensor(ids, at::kInt).to(at::kLong).unsqueeze(0);
  auto output = model->forward_last(prompt_1T, model->initial_state(1));
  std::cout << prompt << std::flush;
  const at::Tensor never = ids_never_drawn(*tokenizer, model->config().vocab_size);
  for (int64_t i = 0; i < length; ++i) {
    const at::Tensor logits_V =
        output.logits_BV[0].index_fill(0, never, -std::numeric_limits<double>::infinity());
    const int64_t token = sample_token(logits_V, sampling, generator);
    if (end && token == *end) {
      break;
    }
    const auto id = static_cast<int32_t>(token);
    std::cout << tokenizer->decode(std::span(&id, 1)) << std::flush;
    output = model->forward_last(at::full({1, 1}, token, at::kLong), output.state);
  }
  std::cout << '\n';
  return 0;
}

}  // namespace rwkv
